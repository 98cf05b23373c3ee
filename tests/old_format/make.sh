#!/bin/bash
# Write the files of this folder with the code of commit bb2d4bb, see README.md:
#     tests/old_format/make.sh CHECKOUT_OF_bb2d4bb EMPTY_FOLDER
# All paths are relative to EMPTY_FOLDER, so that what it holds can be moved: they are part of a run's configuration.
set -euo pipefail
code=$(realpath "$1")
mkdir -p "$2"
cd "$2"
export PYTHONPATH=$code OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= TOKENIZERS_PARALLELISM=false PIXEL_SAIL_CACHE=$PWD/.cache
PIXEL_SAIL_DATA=data
PIXEL_SAIL_RUNS=runs
export PIXEL_SAIL_DATA PIXEL_SAIL_RUNS
python=$code/.venv/bin/python
[ -x "$python" ] || python=python

# Data: three training images and two of validation; what is not read is taken away.
"$python" "$code/tools/make_refshapes.py" --out data/refshapes --seed 3 --train 3 --eval 2 --workers 1
(
    cd data/refshapes
    rm -r glamm_data grefshapes llava muse panoptic pix2cap reason_seg meta.json
    rm osprey/osprey_conversation.json osprey/osprey_detail_description.json
    rm perbench/STBench_Detailed_Caption.json perbench/STBench_VRES.json
)
"$python" "$code/tools/make_tokenizer.py" --refer-root data/refshapes --dataset refshapes --vocab-size 320 \
    --out data/refshapes/tokenizer

tiny=(
    model=tiny deepspeed=none seed=0
    model.architecture.hidden_size=8 model.architecture.intermediate_size=16 model.architecture.num_hidden_layers=2
    model.architecture.num_attention_heads=2 model.architecture.num_key_value_heads=1
    model.architecture.patch_size=8 model.architecture.max_long_side=64 model.architecture.mask_dim=8
    model.architecture.initializer_range=0.2
    loss.points.num_points=32 data.num_workers=0
    log.every=1 log.tensorboard=false log.progress=false
)

# A configuration in words of then.
cp "$code/configs/experiment/quickstart.yaml" .

# A teacher, which the run starts from as well: its export is all that is kept. Its masks are not
# empty, as those of a model that has learned a little are.
"$python" "$code/scripts/train.py" "${tiny[@]}" name=teacher data.packs_per_step=2 data.packs_per_micro_batch=1 \
    'evals=[]' optim.steps=1 optim.lr=1e-5
mv runs/teacher/export teacher
rm -r runs/teacher

run=(
    experiment=quickstart "${tiny[@]}" name=run 'source@data.sources=[refshapes,groupshapes,osprey_short_form]'
    'data.sources.osprey_short_form.annotations=${paths.data}/refshapes/osprey/osprey_short_form.json'
    'data.sources.osprey_short_form.image_dirs=[${paths.data}/refshapes/images/train2014]'
    'data.leakage.held_out=[{root: "${paths.data}/refshapes", dataset: refshapes, split_by: unc, splits: [val, testA]}]'
    data.packing.token_budget=640 data.packing.lookahead=2 data.packing.max_samples=2 data.packing.balance=flops
    data.packs_per_step=2 data.packs_per_micro_batch=1 data.lane_rounds=2 data.max_skipped_share=0.01
    # The names of two teachers of the paper, with an export of ours behind both: one runs, of one the maps are stored.
    experts=sam2_mask2former
    experts.mask2former.model._target_=pixel_sail.experts.ours.ours experts.mask2former.model.weights=teacher
    experts.mask2former.channels=8 experts.mask2former.precision=fp32 experts.mask2former.share=0.75
    experts.sam2.model._target_=pixel_sail.experts.ours.ours experts.sam2.model.weights=teacher
    experts.sam2.channels=8 experts.sam2.precision=fp32 experts.sam2.loss=cosine
    allow_random_experts=false
    model.init_from=teacher speed.elementwise=plain speed.attention=segments speed.experts=mixed
    optim.steps=6 optim.lr=1e-4 optim.ema_decay=0.9
    'evals=[refshapes_val]' validation.every=3 validation.max_images=1 predict.answer=forced predict.token_budget=4096
    checkpoint.rewinds=2 checkpoint.every=100 watchdog.limit_s=600
    corridor.loss_at_600.after=2 corridor.loss_at_600.low=0 corridor.loss_at_600.high=0.01 corridor.loss_at_1600.after=5
    corridor.loss_at_1600.metric=text corridor.loss_at_1600.low=0.0 corridor.loss_at_1600.high=100
    corridor.loss_at_1600.action=stop
)

# The maps of one teacher, stored.
"$python" "$code/tools/cache_expert_features.py" "${run[@]}" '~experts.mask2former' --out cache --dtype int8
run+=(experts.sam2.cache=cache/sam2)

# Three steps, a note of a rewind from there, and the three steps behind it.
"$python" "$code/scripts/train.py" "${run[@]}" checkpoint.stop_after=3
rm -rf runs/run/export
"$python" - <<'PYTHON'
import json
from pathlib import Path

from pixel_sail.data.packing import LanePosition
from pixel_sail.training.finite import NonFiniteLossError
from pixel_sail.training.rewind import rewind

run = Path("runs/run")
lanes = json.loads((run / "checkpoints" / "step_00000003" / "state.json").read_text())["train_state"]["lanes"]
# As if the step after had failed: the data goes on behind two more samples of every lane.
lanes = [LanePosition(next=lane["next"] + 2, waiting=tuple(number + 2 for number in lane["waiting"])) for lane in lanes]
error = NonFiniteLossError("total is nan")
print(rewind(run, error, from_step=3, failed_step=4, lanes=lanes, limit=2))
PYTHON
cp -r runs/run stopped
"$python" "$code/scripts/train.py" "${run[@]}"
mv runs/run runs/whole
mv stopped runs/run
rm -r runs/whole/checkpoints

# Its scores and an answer.
"$python" "$code/scripts/evaluate.py" checkpoint=runs/whole resamples=20 examples=0 predict.answer=forced \
    predict.token_budget=4096 'evals=[refshapes_val,refshapes_val_text_hidden]' progress=false
"$python" "$code/scripts/evaluate.py" checkpoint=runs/whole resamples=20 examples=0 predict.max_new_tokens=4 \
    'evals=[refshapes_region_choice]' progress=false
"$python" "$code/scripts/predict.py" checkpoint=runs/whole image=data/refshapes/images/train2014/COCO_train2014_000000000001.jpg \
    "question='Please segment the <Prompt0> in this image.'" 'boxes=[[10,20,90,80]]' output=predict predict.answer=forced \
    predict.token_budget=4096

# A sweep over a key that has another name today; of each job what the tables and plots read is kept.
"$python" "$code/scripts/train.py" -m --folder=sweep "${tiny[@]}" 'evals=[]' optim.steps=2 \
    data.packs_per_micro_batch=1 data.packs_per_step=1,2 \
    '--evaluate=evals=[refshapes_val] predict.answer=forced resamples=20 examples=0 progress=false'
rm -rf .cache sweep/*/{checkpoints,export,config.json,starts.jsonl} sweep/jobs/*.log
rm predict/*.png data/refshapes/images/train2014/*_00000000000[6-9].jpg
find . -name 'part-*.jsonl' -o -name 'report.*' -o -name .lock | xargs rm
find . -name '*.json*' | xargs sed -i "s#$code/##g; s#$PWD/##g"
