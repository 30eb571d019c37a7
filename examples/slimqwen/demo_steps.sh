# shellcheck shell=bash disable=SC2154
# What the demos share: an output directory made anew, and steps that are logged and timed. Sourced, with $out set.

# begin_demo DIRECTORY...: empty $out, if it is a demo's, and make these directories in it.
begin_demo() {
  if [[ -e $out ]]; then
    [[ -e $out/demo.started ]] || { echo "error: $out exists and is not a demo's output; name another directory" >&2; exit 2; }
    rm -rf "$out"
  fi
  mkdir -p "$out/logs" "$out/results" "${@/#/$out/}"
  touch "$out/demo.started"
}

# step NAME COMMAND...: run it, log it, time it; the JSON line that ends its output is kept as its result.
step() {
  local name=$1 begin=$SECONDS status=0
  shift
  printf '%-28s' "$name"
  "$@" >"$out/logs/$name.out" 2>"$out/logs/$name.err" || status=$?
  if [[ $status -ne 0 ]]; then
    echo "failed (exit code $status); the end of $out/logs/$name.err:"
    tail -n 30 "$out/logs/$name.err"
    exit "$status"
  fi
  echo "$((SECONDS - begin)) s"
  printf '{"step": "%s", "seconds": %d}\n' "$name" "$((SECONDS - begin))" >>"$out/timings.jsonl"
  tail -n 1 "$out/logs/$name.out" >"$out/results/$name.json"
}
