"""A plan in words."""

from __future__ import annotations

from composer_path.planning.plan import PEAK_FLOPS, RESERVED, Plan

GB = 1e9
MIB = 2.0**20


def format_plan(plan: Plan, *, mfu: float, samples: int | None, price: float | None) -> str:
    """Memory, microbatches, work and time, at the share of the peak (`mfu`) that is assumed to be used.

    Without the run's `samples` it leaves out hours and cost; without the price of a GPU's hour, the cost.
    """
    sections = [_memory(plan), _microbatches(plan), _work(plan, mfu), _run(plan, mfu, samples, price)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _memory(plan: Plan) -> list[str]:
    machine, standing = plan.machine, plan.standing
    reserved = machine.memory * RESERVED
    free = machine.memory - reserved - standing.total
    copies = f", {plan.replicas} replicas of {machine.gpus // plan.replicas}" if plan.sharding != "DDP" else ""
    sharding = plan.sharding + (copies if plan.replicas > 1 else "")
    lines = [f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''} of {machine.memory / GB:.0f} GB, {sharding}"]
    lines += [f"can't start: {plan.problem}"] if plan.problem else []
    lines += [f"warning: {plan.warning}"] if plan.warning else []
    for name, (count, learns) in plan.parameters.items():
        lines.append(f"  {name:15} {count / 1e6:10,.1f} M weights  {'trained' if learns else 'frozen'}")
    rows = [
        ("weights", standing.weights, "fp32 where trained, bf16 (less where rounded) where frozen"),
        ("gradients", standing.gradients, "fp32"),
        ("moments", standing.moments, "of the optimizer"),
        ("gathered", standing.gathered, "weights and gradients that are whole for the moment"),
        ("reserved", reserved, f"{RESERVED:.0%} for context, NCCL and fragments (an assumption)"),
        ("activations", free, "what is left"),
    ]
    lines += ["", "memory of a GPU, GB", *(f"  {name:12} {size / GB:7.1f}  {what}" for name, size, what in rows), ""]
    gathers = f"rank 0 gathers {plan.host_bytes / GB:.1f} GB of weights in its host memory"
    lines.append(f"saving: {gathers}; a checkpoint holds {plan.checkpoint_bytes / GB:.1f} GB")
    if machine.gpus > 1:
        sent = plan.traffic
        parts = [(sent.within, "in its replica"), (sent.between, "between replicas")]
        often = "step" if plan.sharding == "DDP" else "microbatch"
        said = ", ".join(f"{size / GB:.1f} GB {where}" for size, where in parts if size)
        lines.append(f"a GPU sends in each {often}: {said}")
    return lines


def _microbatches(plan: Plan) -> list[str]:
    sample = plan.sample
    images = f"{sample.images} image{'s' if sample.images != 1 else ''}"
    lines = [
        f"samples of {sample.tokens} tokens, {sample.answers} of them answers, {images}",
        "  activation_checkpointing   MiB a token   largest microbatch   computed twice",
    ]
    for fit in plan.fits:
        mark = "  <- this YAML" if fit.checkpointing == plan.chosen else ""
        most = f"{fit.most_tokens:,} tokens" if fit.most_tokens >= sample.tokens else "nothing fits"
        lines.append(f"  {fit.checkpointing:24} {fit.per_token / MIB:13.2f} {most:>20} {fit.recomputed:16.0%}{mark}")
    tokens, largest = f"{plan.wanted_tokens:,}", plan.chosen_fit.most_tokens
    wanted = f"max_tokens_per_microbatch {tokens}" if plan.max_tokens else f"{tokens} tokens"
    if plan.fitting:
        lines.append(f"this YAML fits: {wanted}")
    elif largest >= plan.max_seq_len:
        lines.append(f"this YAML doesn't fit: {wanted}; lower it to {largest // 256 * 256}")
    else:
        longest = f"a sample of max_seq_len {plan.max_seq_len:,}"
        lines.append(f"this YAML doesn't fit: {wanted}, and {longest} doesn't either")
    best = plan.best
    if best is None:
        lines.append("no kind of checkpointing fits: take more GPUs, optimizer adamw_8bit, or a shorter max_seq_len")
    elif best.checkpointing != plan.chosen or not plan.fitting:
        lines.append(
            f"try: execution.activation_checkpointing={best.checkpointing} "
            f"train_loader.max_tokens_per_microbatch={best.most_tokens // 256 * 256}"
        )
    return lines


def _work(plan: Plan, mfu: float) -> list[str]:
    flops = plan.flops
    parts = ", ".join(f"{name} {value / flops.total:.1%}" for name, value in vars(flops).items() if value)
    lines = [f"a sample needs {flops.total / 1e12:.2f} TFLOP ({parts})"]
    lines.append("  GPU    floor, ms a sample   at the assumed MFU")
    for name, peak in PEAK_FLOPS.items():
        floor = flops.total / peak
        lines.append(f"  {name:6} {1e3 * floor:18.1f} {1e3 * floor / mfu:17.1f} ms  ({mfu / floor:.1f} samples/s)")
    return lines


def _run(plan: Plan, mfu: float, samples: int | None, price: float | None) -> list[str]:
    step = plan.flops.total * plan.global_batch_size / (plan.machine.gpus * plan.machine.peak * mfu)
    peak = plan.machine.peak / 1e12
    lines = [f"a step of {plan.global_batch_size} samples: {step:.2f} s at {mfu:.0%} of {peak:.0f} TFLOP/s a GPU"]
    if samples is not None:
        hours = samples / plan.global_batch_size * step / 3600
        lines.append(f"{samples:,} samples: {hours:.1f} hours, {hours * plan.machine.gpus:.0f} GPU hours")
        if price is not None:
            lines.append(f"at {price:g} a GPU hour: {hours * plan.machine.gpus * price:,.0f}")
    return lines
