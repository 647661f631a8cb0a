#!/usr/bin/env bash
# Draws a small data set, pre-trains SynCo on it in two processes, draws its course, and
# compares the k-NN accuracy before and after. Usage: tools/demo.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: tools/demo.sh FOLDER}
data=$folder/imagenet
common=(--cfg configs/demo.yaml --data-path "$data" --output "$folder/runs")
rm -rf "$folder/runs"

[ -d "$data" ] || python -m tools.make_fake_imagenet "$data"
python eval_knn.py "${common[@]}" --tag untrained --random-weights
python -m torch.distributed.launch --nproc_per_node=2 --master_port="${MASTER_PORT:-12345}" \
    main_pretrain.py "${common[@]}" --tag trained
python eval_knn.py "${common[@]}" --tag trained
run=$folder/runs/demo__synco__vit_nano
python -m tools.plot_run "$run/trained" --out "$folder/run.png"

python - "$run" <<'END'
import json
import sys

top1 = {}
for tag in ("untrained", "trained"):
    with open(f"{sys.argv[1]}/{tag}/knn_imagenet/results.json") as file:
        top1[tag] = json.load(file)["knn"]["20"]["top1"]
before, after = top1["untrained"], top1["trained"]
print(f"\n20-NN accuracy of the validation images (chance: {100 / 12:.1f}%)")
print(f"  before pre-training  {before:5.1f}%")
print(f"  after pre-training   {after:5.1f}%  ({after / before:.1f} times)")
END
