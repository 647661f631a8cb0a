#!/usr/bin/env bash
# Pre-trains on one's own photographs, without classes, and shows their neighbours and a map of them
# on a page. Usage: tools/demo_real.sh PHOTOGRAPHS FOLDER
set -euo pipefail
photographs=$(realpath "${1:?usage: tools/demo_real.sh PHOTOGRAPHS FOLDER}")
folder=$(realpath -m "${2:?usage: tools/demo_real.sh PHOTOGRAPHS FOLDER}")
cd "$(dirname "$0")/.."
began=$(date +%s)
common=(--cfg configs/demo_photos.yaml --data-path "$folder/images" --output "$folder/runs")
rm -rf "$folder/runs" "$folder/images"

python -m tools.split_images "$photographs" "$folder/images" --one-class
# about as much training whatever their number: 80 000 views of images
count=$(find "$folder/images/train" -type f | wc -l)
epochs=$((80000 / count + 2))
python -m torch.distributed.launch --nproc_per_node=2 --master_port="${MASTER_PORT:-12345}" \
    main_pretrain.py "${common[@]}" --tag trained --opts TRAIN.EPOCHS "$epochs"
python -m tools.report "$folder/runs/photos__synco/trained" --since "$began" \
    --out "$folder/index.html" --title "SynCo on $count photographs"
