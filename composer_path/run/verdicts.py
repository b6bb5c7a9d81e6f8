"""What of Composer's algorithms and callbacks works here, works with a condition, or is refused with its reason.

Plain data: `--check` refuses by it, docs/algorithms.md shows it, and tests try each class that is in it. What isn't
Composer's own is not in it.
"""

from __future__ import annotations

# Section -> name -> the condition, "" for none. Tried under FSDP2 and DDP, with evaluation, checkpoints and resume.
ACCEPTED: dict[str, dict[str, str]] = {
    "algorithms": {
        "ema": "ours under Composer's name, as Composer's fails under FSDP 2; not with FSDP 1",
        "gradient_clipping": "`clipping_type: adaptive` not with FSDP 1",
    },
    "callbacks": {
        "early_stopper": "`dataloader_label` and `monitor` name an evaluation and its metric",
        "lr_monitor": "",
        "memory_monitor": "needs a GPU",
        "memory_snapshot": "needs a GPU",
        "nan_monitor": "waits for the device in each microbatch; `guards` do the same without, and stop all ranks",
        "oom_observer": "needs a GPU",
        "optimizer_monitor": "",
        "runtime_estimator": "",
        "speed_monitor": "`speed_report` also knows what is computed twice",
        "system_metrics_monitor": "",
        "threshold_stopper": "`dataloader_label` and `monitor` name an evaluation and its metric",
    },
}

_IMAGES = "changes a batch of images and class labels, and a batch here is a row of conversations"
_PILLOW = "changes a torchvision dataset's pictures before they are tensors, which no dataset here has"
_CONVOLUTIONS = "acts on layers of convolutional networks, which no part of this model has"
_NORMS = "replaces norms under autocast, where FSDP's mixed precision computes all in bf16 already: it changes nothing"
_EXPORT = "use callbacks.save_weights"

# Section -> name -> why, and what to do.
REFUSED: dict[str, dict[str, str]] = {
    "algorithms": {
        "alibi": "rewrites the attention of BERT and GPT-2 only; leave it out",
        "aug_mix": f"{_PILLOW}; use stain_jitter or dihedral",
        "blur_pool": f"{_CONVOLUTIONS}; leave it out",
        "channels_last": "FSDP can't shard weights in this memory format, and one layer is a convolution; leave it out",
        "col_out": f"{_PILLOW}; use mpp_jitter or dihedral",
        "cut_mix": f"{_IMAGES}; use image_dropout",
        "cut_out": f"{_IMAGES}; use image_dropout",
        "factorize": "replaces weights by products, which no exported folder knows; leave it out",
        "gated_linear_units": "rewrites BERT's blocks only; leave it out",
        "ghost_batch_norm": f"{_CONVOLUTIONS}; leave it out",
        "gyro_dropout": "replaces torch's Dropout modules, and the language models here have none; use neftune",
        "label_smoothing": "changes class labels, and the loss here is taken from token ids; leave it out",
        "layer_freezing": "freezes by depth, whatever that is of, and forgets the optimizer's moments; use unfreeze",
        "low_precision_group_norm": f"{_NORMS}; leave it out",
        "low_precision_layer_norm": f"{_NORMS}; leave it out",
        "mix_up": f"{_IMAGES}; use neftune",
        "no_op_model": "replaces the model by one that does nothing; leave it out",
        "progressive_resizing": "resizes a batch of images, and the text holds a fixed number of tokens for each; "
        "set model.vision_encoder.image_size",
        "rand_augment": f"{_PILLOW}; use stain_jitter or dihedral",
        "sam": "its checkpoints can't be resumed, and its second pass doesn't divide by the global batch's answer "
        "tokens; leave it out, or average weights with ema",
        "selective_backprop": "leaves out samples by class loss, and Composer's loss per sample isn't one of tokens; "
        "leave it out",
        "seq_length_warmup": "cuts or reshapes each tensor of a batch by length, and would cut images' places away; "
        "leave it out",
        "squeeze_excite": f"{_CONVOLUTIONS}; leave it out",
        "stochastic_depth": "acts on ResNet's bottlenecks only; leave it out",
        "swa": "copies the whole model, which FSDP can't; use ema, whose half_life says how far back it averages",
        "weight_standardization": "puts a parametrization on convolutions, and the exported folder can't be loaded; "
        "leave it out",
    },
    "callbacks": {
        "activation_monitor": "expects batches and activations that are plain tensors; use optimizer_monitor",
        "checkpoint_saver": "use trainer.save_interval and its neighbours",
        "export_for_inference": f"copies the model, which FSDP can't; {_EXPORT}",
        "free_outputs": "a forward pass here hands over one number an answer token, so it frees nothing; leave it out",
        "generate": "expects a HuggingFaceModel and text prompts; ask the exported folder with composer-path ask",
        "image_visualizer": "shows batches of images with class labels; leave it out",
        "load_checkpoint": "reads pickles past the guard of checkpoints; use trainer.load_path",
        "mlperf": "writes a benchmark's submission and needs its package; leave it out",
    },
}

# What llm-foundry calls some of them.
FOUNDRY = {
    "low_precision_layernorm": "low_precision_layer_norm",
    "low_precision_groupnorm": "low_precision_group_norm",
    "mixup": "mix_up",
    "cutmix": "cut_mix",
    "cutout": "cut_out",
    "colout": "col_out",
    "augmix": "aug_mix",
    "randaugment": "rand_augment",
    "blurpool": "blur_pool",
    "ghost_batchnorm": "ghost_batch_norm",
    "layer_freeze": "layer_freezing",
}

ON_GPUS = ("memory_monitor", "memory_snapshot", "oom_observer")
STOPPERS = ("early_stopper", "threshold_stopper")


def refused(section: str) -> dict[str, str]:
    """Names that a section may not hold, and why; llm-foundry's spellings among them."""
    ours = REFUSED.get(section, {})
    return ours | ({name: ours[meant] for name, meant in FOUNDRY.items()} if section == "algorithms" else {})
