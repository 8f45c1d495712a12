#!/usr/bin/env bash
# From nothing to videos made from text, judged, with a report: the whole pipeline on a CPU.
#   bash scripts/quickstart.sh [--videos DIR] [--output DIR]
# Stages that are done are skipped, a stopped stage goes on where it was: run the same command again.
# --videos DIR trains on your own clips instead of rendered scenes (captions: a .txt beside each
# video, DIR/captions.csv with path,text, or the file names).
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
videos=""
output=$PWD/outputs/quickstart
while (($#)); do
    case $1 in
    --videos | --output)
        [[ $# -ge 2 ]] || { echo "quickstart.sh: $1 needs a folder" >&2; exit 64; }
        [[ $1 == --videos ]] && videos=$2 || output=$2
        shift 2
        ;;
    -h | --help)
        sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *)
        echo "quickstart.sh: unknown option '$1' (see --help)" >&2
        exit 64
        ;;
    esac
done
python=$(bash "$root/scripts/setup.sh" run)
exec "$python" "$root/tools/quickstart.py" --output "$output" ${videos:+--videos "$videos"}
