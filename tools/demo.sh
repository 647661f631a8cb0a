#!/usr/bin/env bash
# Draws a small data set, pre-trains SynCo on it in two processes, and compares the k-NN accuracy of
# the encoder with that before training, of raw pixels and of colour histograms. It leaves
# demo.json and index.html. Usage: tools/demo.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: tools/demo.sh FOLDER}
began=$(date +%s)
data=$folder/imagenet
runs=$folder/runs/demo__synco
common=(--cfg configs/demo.yaml --data-path "$data" --output "$folder/runs")
rm -rf "$folder/runs" "$data"

python -m tools.make_fake_imagenet "$data"
for baseline in raw_pixels colour_histogram; do
    python eval_knn.py "${common[@]}" --tag "$baseline" --baseline "$baseline"
done
python eval_knn.py "${common[@]}" --tag untrained --random-weights
python -m torch.distributed.launch --nproc_per_node=2 --master_port="${MASTER_PORT:-12345}" \
    main_pretrain.py "${common[@]}" --tag trained
python eval_knn.py "${common[@]}" --tag trained
python -m tools.report "$runs/trained" --since "$began" --out "$folder/index.html" \
    --beside "$runs/untrained" "$runs/raw_pixels" "$runs/colour_histogram" \
    --title "SynCo on drawn shapes: a demonstration"

python - "$folder" "$began" <<'END'
import json
import sys
import time

folder, began = sys.argv[1:]
found = {}
for tag in ("untrained", "trained", "raw_pixels", "colour_histogram"):
    name = "knn_imagenet" if "trained" in tag else f"knn_imagenet_{tag}"
    with open(f"{folder}/runs/demo__synco/{tag}/{name}/results.json") as file:
        found[tag] = json.load(file)["knn"]["20"]["top1"]
found["seconds"] = round(time.time() - int(began))
with open(f"{folder}/demo.json", "w") as file:
    json.dump(found, file, indent=2)
print(f"""
20-NN accuracy of the validation images (chance: {100 / 12:.1f}%)
  colour histogram     {found["colour_histogram"]:5.1f}%
  raw pixels           {found["raw_pixels"]:5.1f}%
  before pre-training  {found["untrained"]:5.1f}%
  after pre-training   {found["trained"]:5.1f}%
{found["seconds"]} seconds; open {folder}/index.html in a browser""")
END
