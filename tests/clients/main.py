"""Does what serves models load our exports?  ``make test-clients``, or ``python -m tests.clients.main``.

Makes tiny pruned models, installs each client into an environment of its own, has it load every model, and compares
its results with transformers' in fp32 from the same files. Exit code 1 if something that is expected to work does not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_slim.errors import SlimError
from tests.clients.clients import CLIENTS, NOT_RUN, Client, known
from tests.clients.models import CASES, PICTURES, ROOT, Case, write_cases

HERE = Path(__file__).resolve().parent
INSTALL_MINUTES = 30
# Not the path to this package; no GPU; nothing is looked up in a network.
ENVIRONMENT = {"PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
ENVIRONMENT |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
MADE = "\nwith exports in FP8\n"  # what else `prepare` leaves; models of an earlier release are made again
FAILS, NOT_INSTALLED, DIFFERS, SKIPPED = "does not load", "not installed", "other results", "not run"


@dataclass(frozen=True)
class Row:
    """What became of one check of one model."""

    client: str
    version: str
    case: str
    check: str
    result: str
    note: str
    known: str = ""

    @property
    def works(self) -> bool:
        """The client loaded the model, and its results are those expected."""
        return self.result not in (FAILS, NOT_INSTALLED, DIFFERS, SKIPPED)


def output(command: Sequence[str | Path], minutes: int, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code (124: out of time), standard output and standard error of a command and all that it starts."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=err, env=os.environ | (env or {}), start_new_session=True
        )
        try:
            code = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            _end_group(process)
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what the command started and left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def reason(code: int, stderr: str) -> str:
    """The line that says why: of a traceback, the last one that is not indented and names an error."""
    if code == 124:
        return "out of time"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0] or line.startswith(("error:", "ERROR:"))]
    return (errors or lines or [f"exit code {code}"])[-1][:300]


def install(client: Client, environment: Path, python: str) -> str:
    """Build the environment, or take the one of the same requirements; returns why that failed, or nothing."""
    stamp = environment / ".complete"
    wanted = json.dumps([client.requirements, client.remove, client.without_dependencies, client.unpack, python])
    if stamp.exists() and stamp.read_text() == wanted:
        return ""
    shutil.rmtree(environment, ignore_errors=True)
    pip = (environment / "bin/python", "-m", "pip", "--disable-pip-version-check")
    steps: list[Sequence[str | Path]] = [(python, "-m", "venv", environment), (*pip, "install", *client.requirements)]
    if client.remove:
        steps.append((*pip, "uninstall", "--yes", *client.remove))
    if client.without_dependencies:
        steps.append((*pip, "install", "--no-deps", *client.without_dependencies))
    if client.unpack:
        steps.append(
            (*pip, "download", "--no-deps", "--no-binary", ":all:", "-d", environment / "src", client.unpack[0])
        )
    for step in steps:
        code, _, stderr = output(step, INSTALL_MINUTES)
        if code:
            return reason(code, stderr)
    if client.unpack:
        (archive,) = (environment / "src").glob("*.tar.gz")
        shutil.unpack_archive(archive, environment / "src", filter="data")
        archive.unlink()
    stamp.write_text(wanted)
    return ""


def how_to_get(name: str) -> str:
    """What a person can do about a client that was not installed here."""
    client = CLIENTS[name]
    wanted = " ".join((*client.requirements, *client.without_dependencies))
    return f"it needs a package index that has {wanted} for this Python; CLIENTS_PYTHON=... gives another"


def version_of(package: str, environment: Path) -> str:
    """The version that is installed."""
    program = f"import importlib.metadata as m; print(m.version({package!r}))"
    return output((environment / "bin/python", "-c", program), 1)[1].strip()


def check(client: Client, name: str, case: Path, environment: Path) -> tuple[str, str]:
    """Result and note of a check."""
    with tempfile.TemporaryDirectory() as scratch:
        env = ENVIRONMENT | {"OMP_NUM_THREADS": str(os.cpu_count())} | dict(client.env)
        command = (environment / "bin/python", HERE / client.script, case, scratch, name)
        code, stdout, stderr = output(command, client.minutes, env)
        (case / f"{client.script}-{name}.log").write_text(f"{stdout}\n{stderr}")
        if code or not stdout.strip():
            return FAILS, reason(code, stderr)
        found = json.loads(stdout.splitlines()[-1])
        saved = Path(scratch) / "saved"
        return _read_back(saved, case) if saved.exists() else (found["result"], found["note"])


def _read_back(saved: Path, case: Path) -> tuple[str, str]:
    """What this package's own reader makes of a directory that the client saved: the same weights, or not."""
    from megatron_slim import open_checkpoint

    ours = open_checkpoint(case / "model")
    try:
        found = open_checkpoint(saved)
    except SlimError as error:
        return DIFFERS, f"our reader refuses what it saved: {error.what}"
    same = set(found.names) == set(ours.names) and all(bool((found.read(n) == ours.read(n)).all()) for n in found.names)
    return ("loads" if same else DIFFERS), f"our reader finds the same {len(ours.names)} weights in what it saved"


def try_client(name: str, work: Path, python: str, cases: Sequence[Case]) -> list[Row]:
    """All checks of a client."""
    client, environment = CLIENTS[name], work / name
    print(f"{name}: environment", file=sys.stderr, flush=True)
    if missing := install(client, environment, python):
        return [Row(name, "", "", "", NOT_INSTALLED, missing)]
    version, rows = version_of(client.package, environment), []
    for case in cases:
        for kind in (kind for kind, wanted in client.checks.items() if wanted(case)):
            result, note = check(client, kind, work / "models" / "cases" / case.name, environment)
            rows.append(Row(name, version, case.name, kind, result, note, known(name, kind, case.name)))
            print(f"{name}: {case.name}, {kind}: {result} ({note})", file=sys.stderr, flush=True)
    return rows


def prepare(models: Path, cases: Sequence[Case]) -> None:
    """Models and expected results, unless an earlier run has made them."""
    from tests.clients.expected import write_expected

    stamp, made = models / "complete", "\n".join(map(repr, cases)) + MADE
    if stamp.exists() and stamp.read_text() == made:
        return
    print("making models", file=sys.stderr, flush=True)
    shutil.rmtree(models, ignore_errors=True)
    write_cases(models, tuple(cases))
    for case in cases:
        source = models / PICTURES if case.model_type == PICTURES else None
        write_expected(models / "cases" / case.name, case.has_mtp, source)
    stamp.write_text(made)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """One entry for every client that loads models, as ``clients`` of an evaluation's results in `compression`."""
    found = {}
    reading = {name for name, client in CLIENTS.items() if client.reads_rules}
    for name in dict.fromkeys(row.client for row in rows if row.client not in reading):
        own = [row for row in rows if row.client == name]
        works = sum(row.works for row in own)
        failed = "; ".join(f"{row.case} {row.check}: {row.result}" for row in own if not row.works)
        note = f"{works} of {len(own)} checks of tiny models" + (f"; {failed}" if failed else "")
        found[name] = {"version": own[0].version, "loads": works > 0, "note": note}
    return found


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown, which is readable as it is."""
    cells = [("client", "version", "model", "check", "result", ""), ("---",) * 6]
    for row in rows:
        expected = f" (known: {row.known})" if row.known and row.known != row.note else ""
        cells.append((row.client, row.version, row.case, row.check, row.result, row.note.replace("|", "/") + expected))
    widths = [max(len(line[i]) for line in cells) for i in range(5)]
    return "\n".join("| " + " | ".join([*map(str.ljust, line, widths), line[5]]) + " |" for line in cells)


def main() -> int:
    """Run the clients that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"default: all of {', '.join(CLIENTS)}")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".clients", help="environments and models (default: .clients)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="results (default: results.json in --work)")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the clients' environments")
    parser.add_argument("--models", nargs="*", metavar="MODEL", help="try these models alone")
    args = parser.parse_args()
    if unknown := set(args.clients) - set(CLIENTS):
        parser.error(f"unknown client {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}")
    work = args.work.resolve()
    prepare(work / "models", CASES)
    cases = [case for case in CASES if not args.models or case.name in args.models]
    rows = [row for name in args.clients or CLIENTS for row in try_client(name, work, args.python, cases)]
    if not args.clients:
        rows += [Row(name, version, "", "", SKIPPED, why, why) for name, (version, why) in NOT_RUN.items()]
    document = {"clients": summary(rows), "rows": [asdict(row) for row in rows]}
    (args.json or work / "results.json").write_text(json.dumps(document, indent=2) + "\n")
    print(table(rows))
    missing = [row for row in rows if row.result == NOT_INSTALLED]
    for row in missing:
        print(f"not installed, so not tried: {row.client}: {row.note} ({how_to_get(row.client)})")
    broken = [row for row in rows if not row.works and row.result != NOT_INSTALLED and not row.known]
    for row in (row for row in rows if row.works and row.known):
        print(f"works now, take it out of KNOWN: {row.client} {row.case} {row.check}")
    for row in broken:
        print(f"unexpected: {row.client} {row.case} {row.check}: {row.result}, {row.note}")
    return 1 if broken or any(row.client in args.clients for row in missing) else 0


if __name__ == "__main__":
    sys.exit(main())
