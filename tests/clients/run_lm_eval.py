"""lm-eval: a task of four documents with its own text, by its command line, on the export as it is."""

from __future__ import annotations

import json
import math
import subprocess
import sys

from common import DIFFERS, SAME_LOGITS, Case, Result, main

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
metadata: {{version: 1}}
"""
TEXTS = (("The model", " is pruned"), ("A plan has", " every decision"), ("one file", " of weights"), ("a", " b"))


def task(case: Case) -> Result:
    """Its perplexity is exp of minus the mean log-likelihood of the targets, which transformers gives as well."""
    documents = case.scratch / "documents.jsonl"
    documents.write_text("".join(json.dumps({"context": a, "target": b}) + "\n" for a, b in TEXTS))
    (case.scratch / "tiny.yaml").write_text(TASK.format(file=documents))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "tiny", "--include_path", case.scratch]
    command += ["--model_args", f"pretrained={case.model},dtype=float32", "--device", "cpu", "--batch_size", "1"]
    command += ["--output_path", case.scratch / "out.json"]
    done = subprocess.run(list(map(str, command)), stdout=sys.stderr, env=None)
    if done.returncode:
        raise RuntimeError(f"lm_eval ended with exit code {done.returncode}")
    (results,) = case.scratch.glob("out*.json")
    found = json.loads(results.read_text())["results"]["tiny"]["perplexity,none"]
    expected = math.exp(-sum(_log_likelihood(case)) / len(TEXTS))
    result = SAME_LOGITS if math.isclose(found, expected, rel_tol=1e-4) else DIFFERS
    return result, f"perplexity {found:.6g}, expected {expected:.6g}"


def _log_likelihood(case: Case) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    sums = []
    for context, target in TEXTS:
        start, whole = (tokenizer(text)["input_ids"] for text in (context, context + target))
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        sums.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(start), len(whole))))
    return sums


main({"task": task})
