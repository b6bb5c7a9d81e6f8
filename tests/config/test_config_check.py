"""Each mistake is one line: where, what was found, what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from config_problems import problems_of

from composer_path.config.reading import ConfigError, load_config

# override -> what its one line must say, after the key's path
MISTAKES = [
    ("optimizer.lr=.nan", "optimizer.lr: found nan; it must be a finite number"),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas: found 1.0; it must be at least 0 and below 1"),
    ("optimizer.eps=.inf", "optimizer.eps: found inf; it must be a finite number"),
    ("algorithms.gradient_clipping.clipping_threshold=-1", "clipping_threshold: found -1; it must be above 0"),
    ("algorithms.gradient_clipping.clipping_type=nrom", "found the text 'nrom'; did you mean norm?"),
    ("trainer.max_duration=0.5ep", "trainer.max_duration: found 0.5ep, which is no time; write a whole number"),
    ("scheduler.alpha_f=-0.1", "scheduler.alpha_f: found -0.1; it must be at least 0"),
    ("scheduler.t_warmup=2dur", "scheduler.t_warmup: found 2dur; it must be at most 1dur"),
    ("optimizer.lr=0", "optimizer.lr: found 0; it must be above 0; what shall not learn, leave out of trainable"),
    ("optimizer.lr={projector: -1.0}", "optimizer.lr: projector: found -1.0; it must be above 0"),
    ("tokenizer.tokenizer_class=5", "tokenizer.tokenizer_class: unknown key; there are path, use_fast"),
    ("tokenizer.use_fst=true", "tokenizer.use_fst: unknown key; did you mean tokenizer.use_fast?"),
    ("tokenizer.chat_template=5", "tokenizer.chat_template: found 5; it must be text"),
    ("trainer.max_duration=0ep", "trainer.max_duration: found 0ep; it must be above 0"),
    ("trainer.max_duration=0", "trainer.max_duration: found 0; it must be above 0"),
    ("trainer.max_duration=1iter", "trainer.max_duration: found 1iter; its unit must be one of ep, ba, sp, tok"),
    ("trainer.max_duration=5sec", "trainer.max_duration: found 5sec; its unit must be one of ep, ba, sp, tok"),
    ("trainer.max_duration=1dur", "trainer.max_duration: found 1dur; its unit must be one of ep, ba, sp, tok"),
    ("trainer.max_duration=infep", "trainer.max_duration: found infep, which is no time"),
    ("trainer.save_interval=0ba", "trainer.save_interval: found 0ba; it must be above 0"),
    ("trainer.save_interval=1iter", "trainer.save_interval: found 1iter; its unit must be one of ep, ba, sp, tok, dur"),
    ("trainer.console_log_interval=5tok", "trainer.console_log_interval: found 5tok; its unit must be one of ep, ba"),
    ("callbacks.optimizer_monitor.batch_log_interval=0", "batch_log_interval: found 0; it must be at least 1"),
    ("scheduler.t_warmup=-1ba", "scheduler.t_warmup: found -1ba; it must be at least 0"),
    ("algorithms.ema.half_life=10", "algorithms.ema.half_life: found 10; it must be text or null"),
    ("algorithms.ema.half_life=0ba", "algorithms.ema.half_life: found 0ba; it must be above 0"),
    ("algorithms.ema.ema_start=later", "algorithms.ema.ema_start: found later, which is no time"),
    ("algorithms.ema.ema_start=0.7", "algorithms.ema.ema_start: found 0.7; it must be text"),
    ("algorithms.unfreeze.projector=1eq", "algorithms.unfreeze.projector: found 1eq, which is no time"),
    ("algorithms.ema.update_interval=0ba", "algorithms.ema.update_interval: found 0ba; it must be above 0"),
    ("scheduler.t_warmup=30sec", "scheduler.t_warmup: found 30sec; its unit must be one of ep, ba, sp, tok, dur"),
    ("train_loader.dataset.shuffle_algo=py1", "train_loader.dataset.shuffle_algo: found the text 'py1'; did you mean"),
    ("train_loader.dataset.batching_method=stratified", "batching_method: found stratified, which leaves out what"),
    ("train_loader.dataset.batching_method=per_stream", "batching_method: found per_stream, which leaves out what"),
    ("train_loader.dataset.batching_method=device_per_stream", "found device_per_stream, which leaves out what"),
    ("train_loader.dataset.partition_algo=orig", "partition_algo: found orig, which belongs to Streaming's partition"),
    ("eval_loader.dataset.replication=2", "eval_loader.dataset.replication: found 2, which gives several ranks the"),
    ("train_loader.dataset.drop_last=true", "train_loader.dataset.drop_last: "),
    ("train_loader.dataset.sampling_method=even", "it must be 'balanced' or 'fixed'"),
    ("train_loader.dataset.sampling_granularity=0", "sampling_granularity: found 0; it must be at least 1"),
    ("train_loader.dataset.predownload=0", "train_loader.dataset.predownload: found 0; it must be at least 1"),
    ("train_loader.dataset.replication=0", "train_loader.dataset.replication: found 0, which gives several ranks"),
    ("train_loader.dataset.shuffle_block_size=1", "shuffle_block_size: found 1, which mixes nothing; give at least 2"),
    ("train_loader.dataset.cache_limit=10gigs", "train_loader.dataset.cache_limit: found 10gigs, which is no size"),
    (
        "train_loader.dataset.cache_limit=64",
        "train_loader.dataset.cache_limit: found 64, which is no size or too small",
    ),
    ("train_loader.dataset.epoch_size=some", "train_loader.dataset.epoch_size: found some; it must be a number of"),
    (
        "train_loader.dataset.validate_hash=md6",
        "train_loader.dataset.validate_hash: found the text 'md6'; did you mean",
    ),
    ("train_loader.dataset.remote=http://a/b", "train_loader.dataset.remote: http://a/b: must be a folder, s3://"),
    ("train_loader.dataset.local=s3a://a/b", "train_loader.dataset.local: s3a://a/b: must be a folder, s3://"),
    ("model.vision_encoder.image_size=120", "found 120, which is no multiple of the patch size 16; take 112 or 128"),
    ("trainer.run_name=../x", "trainer.run_name: found '../x', which is no folder below save_root"),
    ("save_root='~/runs'", "save_root: found '~/runs'; it must be a folder (~ isn't filled in, ${oc.env:HOME} is)"),
    ("trainer.run_name=/x", "trainer.run_name: found '/x', which is no folder below save_root"),
    ("save_root=${${variables.shards}:x}", "filled in are ${other.key} and ${oc.env:NAME} only"),
    ("algorithms=${oc.decode:'{}'}", "algorithms: found ${oc.decode:'{}'}; a section is written out"),
    ("execution.fusion=true", "execution.fusion: found true; it must be 'off' or 'compile' or 'liger' or false"),
    ("version=2", "version: found 2; it must be 1"),
    ("seed=-1", "seed: found -1; it must be at least 0"),
    ("sede=3", "sede: unknown key; did you mean seed?"),
    ("max_seq_len=9", "max_seq_len: unknown key; did you mean train_loader.dataset.max_seq_len"),
    ("tokenizer.path=null", "tokenizer.path: found null; it must be text"),
    ("model.atention=auto", "model.atention: unknown key; did you mean model.attention?"),
    ("model.attention=flash", "model.attention: found the text 'flash'; did you mean"),
    ("model.trainable=[projecter]", "model.trainable: found the text 'projecter'; did you mean projector?"),
    ("model.trainable=[]", "model.trainable: found an empty list; name what this stage trains"),
    ("model.vision_encoder.name=timm/vit_tiny_patch16_244", "did you mean vit_tiny_patch16_224"),
    ("model.vision_encoder.name=unii", "model.vision_encoder.name: unknown name 'unii'; it must be one of"),
    ("model.vision_encoder.name=open_clip/ViT-Z", "model.vision_encoder.name: "),
    ("model.vision_encoder.tokens=cls", "model.vision_encoder.tokens: found the text 'cls'; "),
    (
        "model.vision_encoder.image_size=112.5",
        "model.vision_encoder.image_size: found 112.5; it must be a whole number",
    ),
    (
        "model.projector={weights: a.bin, pooler_weights: b.bin}",
        "model.projector: found weights and pooler_weights; give the one (a whole projector) or the other",
    ),
    (
        "model.projector.vision_encoder=1",
        "model.projector.vision_encoder: is not set here; leave it out; it is read from the built parts",
    ),
    ("model.projector.type=attn_pool", "model.projector.type: found 'attn_pool'; it must be attn_pool+mlp2x_gelu"),
    ("model.projector.in_dim=64", "model.projector.in_dim: is not set here; leave it out"),
    (
        "model.projector.pooler.heads=4",
        "model.projector.pooler.heads: unknown key; did you mean model.projector.pooler",
    ),
    ("model.language_model.config=null", "model.language_model: found neither of path (weights) and config (random)"),
    ("model.language_model.path=llama", "model.language_model: found both of path (weights) and config (random)"),
    (
        "model.language_model.config={model_type: llama, hiden_size: 64}",
        "model.language_model.config: unknown key 'hiden_size' for model_type llama; did you mean 'hidden_size'?",
    ),
    ("model.language_model.dtype=bf16", "model.language_model.dtype: is not set here; leave it out"),
    ("train_loader.global_batch_size=0", "train_loader.global_batch_size: found 0; it must be at least 1"),
    (
        "train_loader.global_batch_size=many",
        "train_loader.global_batch_size: found the text 'many'; it must be a whole",
    ),
    ("train_loader.global_batch_size='16'", "it must be a whole number (without quotes"),
    ("train_loader.num_workers=true", "train_loader.num_workers: found true; it must be a whole number"),
    ("train_loader.loss_average=tokens", "train_loader.loss_average: found the text 'tokens'; did you mean token?"),
    ("train_loader.max_tokens_per_microbatch=128", "train_loader.max_tokens_per_microbatch: found 128, less than"),
    ("train_loader.dataset.local=null", "train_loader.dataset.local: found null; it must be text"),
    ("train_loader.dataset.batch_size=4", "train_loader.dataset.batch_size: is not set here; use global_batch_size"),
    ("train_loader.dataset.image_size=64", "train_loader.dataset.image_size: is not set here; leave it out"),
    (
        "train_loader.dataset.shufle=true",
        "train_loader.dataset.shufle: unknown key; did you mean train_loader.dataset.shuf",
    ),
    (
        "train_loader.dataset.template=lava_llama_2",
        "train_loader.dataset.template: template: unknown name 'lava_llama_2'",
    ),
    ("train_loader.dataset.template={name: plain, system: x}", "train_loader.dataset.template: template.system: "),
    ("optimizer.name=adamz", "optimizer.name: found the text 'adamz'; did you mean adam?"),
    (
        "optimizer.lr='2e-3'",
        "optimizer.lr: found the text '2e-3'; it must be a number or a mapping of names to a number",
    ),
    ("optimizer.lr={projectr: 1e-3}", "optimizer.lr.projectr: is not trained; did you mean projector?"),
    ("optimizer.lr={language_model: 1e-3}", "optimizer.lr.projector: is missing; give each trained module a rate"),
    ("optimizer.betas=[0.9]", "optimizer.betas: found a list of 1; it must be a list of 2: a number, a number"),
    ("optimizer.weight_decay=-0.1", "optimizer.weight_decay: found -0.1; it must be at least 0"),
    (
        "optimizer.momentum=0.9",
        "optimizer.momentum: unknown key; there are lr, weight_decay, groups",
    ),
    (
        "scheduler.name=cosine_warmup",
        "scheduler.name: found the text 'cosine_warmup'; did you mean cosine_with_warmup?",
    ),
    ("scheduler.t_warmup=3", "scheduler.t_warmup: found 3; it must be text, a time such as 1ep or 500ba"),
    (
        "scheduler.t_warmup=3 percent",
        "scheduler.t_warmup: found 3 percent, which is no time; write a whole number and a unit",
    ),
    ("scheduler.warmup=3ba", "scheduler.warmup: unknown key; did you mean scheduler.t_warmup?"),
    ("algorithms.stain_jiter={}", "algorithms.stain_jiter: unknown key; did you mean algorithms.stain_jitter?"),
    ("algorithms.stain_jitter.strenght=1", "unknown key; did you mean algorithms.stain_jitter.strength?"),
    ("algorithms.gradient_clipping.threshold=1", "did you mean algorithms.gradient_clipping.clipping_threshold?"),
    ("callbacks.speed_report.window_size=ten", "callbacks.speed_report.window_size: found the text 'ten'"),
    ("callbacks.nan_monitor={x: 1}", "callbacks.nan_monitor.x: unknown key; it takes no keywords"),
    (
        "train_loader.dataset.streams=[1]",
        "train_loader.dataset.streams: found a list of 1; it must be a mapping of names of your own to local, remote",
    ),
    ("callbacks.speed_report=10", "callbacks.speed_report: found 10; it must be a mapping of window_size"),
    ("callbacks.save_weights.interval=1 epoch", "callbacks.save_weights.interval: found 1 epoch, which is no time"),
    ("callbacks.save_weights.model=x", "callbacks.save_weights.model: unknown key; "),
    ("callbacks.checkpoint_saver={}", "callbacks.checkpoint_saver: is not set here; use trainer.save_interval"),
    ("loggers.tensorbord={}", "loggers.tensorbord: unknown key; did you mean loggers.tensorboard?"),
    ("trainer.max_duratoin=1ep", "trainer.max_duratoin: unknown key; did you mean trainer.max_duration?"),
    (
        "trainer.save_interval=1epp",
        "trainer.save_interval: found 1epp, which is no time; write a whole number and a unit",
    ),
    ("trainer.precision=bf16", "trainer.precision: found the text 'bf16'; did you mean amp_bf16?"),
    ("trainer.device=cuda", "trainer.device: found the text 'cuda'; it must be 'cpu' or 'gpu' or null"),
    ("trainer.callbacks={}", "trainer.callbacks: is not set here; use the section callbacks"),
    ("trainer.loggers={}", "trainer.loggers: is not set here; use the section loggers"),
    ("trainer.algorithms={}", "trainer.algorithms: is not set here; use the section algorithms"),
    ("trainer.optimizers={}", "trainer.optimizers: is not set here; use the section optimizer"),
    ("trainer.schedulers={}", "trainer.schedulers: is not set here; use the section scheduler"),
    ("trainer.model={}", "trainer.model: is not set here; use the section model"),
    ("trainer.train_dataloader={}", "trainer.train_dataloader: is not set here; use the section train_loader"),
    ("trainer.seed=1", "trainer.seed: is not set here; use the top-level seed"),
    ("trainer.save_folder=x", "trainer.save_folder: is not set here; use save_root"),
    (
        "trainer.device_train_microbatch_size=4",
        "trainer.device_train_microbatch_size: is not set here; use train_loader.max_tokens_per_microbatch",
    ),
    ("trainer.console_stream={}", "trainer.console_stream: is not set here; leave it out; it takes an object"),
    ("trainer.parallelism_config.fspd={}", "did you mean trainer.parallelism_config.fsdp?"),
    (
        "trainer.parallelism_config.fsdp.version=3",
        "trainer.parallelism_config.fsdp.version: found 3; it must be one of 1, 2",
    ),
    (
        "trainer.parallelism_config.fsdp.reshard_after_foward=true",
        "fsdp.reshard_after_foward: unknown key; did you mean",
    ),
    ("trainer.parallelism_config.fsdp.sharding_strategy=FULL_SHARD", "fsdp.sharding_strategy: unknown key; "),
    (
        "trainer.parallelism_config.fsdp.mixed_precision=default",
        "fsdp.mixed_precision: found the text 'default'; it must",
    ),
    ("trainer.parallelism_config.fsdp.mixed_precision={param_dtype: int8}", "fsdp.mixed_precision: found a mapping; "),
    ("trainer.save_interval=null", "trainer.autoresume: has nothing to go on from while save_interval is null"),
    ("trainer.parallelism_config.fsdp.activation_checkpointing=true", "use execution.activation_checkpointing"),
    (
        "execution.activation_checkpointing=ful",
        "execution.activation_checkpointing: found the text 'ful'; did you mean full?",
    ),
    ("execution.loss_chunk=0", "execution.loss_chunk: found 0"),
    ("execution.fusio=liger", "execution.fusio: unknown key; did you mean execution.fusion?"),
    ("save_root=???", "save_root: found ???; give a value, here or as the override save_root=..."),
    ("save_root=${oc.env:COMPOSER_PATH_NOT_SET}", "Environment variable 'COMPOSER_PATH_NOT_SET' not found"),
    (
        "save_root=${variables.shard}",
        "save_root: found ${variables.shard}, which can't be filled in: Interpolation key",
    ),
    ("save_root=${oc.create:x}", "save_root: found ${oc.create:x}; filled in are ${other.key} and ${oc.env:NAME} only"),
    ("trainer", "override 'trainer': it must be key=value"),
    ("trainer.max_duration=[", "override 'trainer.max_duration=[': can't be applied"),
]


FSDP_1 = ["trainer.parallelism_config.fsdp={version: 1}"]


@pytest.mark.parametrize(("override", "line"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_mistake_is_named_with_what_to_do(demo: Path, override: str, line: str) -> None:
    problems = problems_of(demo, override)
    assert any(line in problem for problem in problems), problems


def test_a_microbatch_of_the_longest_samples_size_is_accepted_and_one_token_less_is_not(demo: Path) -> None:
    load_config(demo, ["train_loader.max_tokens_per_microbatch=512"])
    (problem,) = problems_of(demo, "train_loader.max_tokens_per_microbatch=511")
    assert "found 511, less than train_loader.dataset.max_seq_len 512" in problem


def test_all_mistakes_are_listed_in_one_error_one_a_line(demo: Path) -> None:
    mistakes = [
        "trainer.max_duratoin=1ep",
        "optimizer.beta=[0.9, 0.999]",
        "algorithms.gradient_clipping.norm=1",
        "callbacks.lr_monitr={}",
        "scheduler.alpha=0",
        "trainer.parallelism_config.fsdp.reshard=true",
        "train_loader.dataset.fit=padd",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config(demo, mistakes)
    error = caught.value
    paths = {problem.split(":")[0] for problem in error.problems}
    # eval_loader.dataset.fit follows train_loader's by interpolation.
    assert paths == {mistake.split("=")[0] for mistake in mistakes} | {"eval_loader.dataset.fit"}
    assert str(error).splitlines()[0] == f"{demo}: 8 problems"
    assert len(str(error).splitlines()) == 1 + len(error.problems)
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("version", [1, 2])
def test_typos_inside_either_fsdp_section_are_errors(demo: Path, version: int) -> None:
    section = f"{{version: {version}, mixed_precison: PURE}}"
    problems = problems_of(demo, "trainer.parallelism_config=null", f"trainer.parallelism_config={{fsdp: {section}}}")
    assert problems[0] == (
        "trainer.parallelism_config.fsdp.mixed_precison: unknown key; did you mean "
        "trainer.parallelism_config.fsdp.mixed_precision?"
    )
    assert all("FSDP1" in problem for problem in problems[1:])


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr={projector: 2e-3}",
        "optimizer.lr=1",
        "optimizer.fused=false",
        "train_loader.dataset.template={name: llava_llama_2, system: Be brief.}",
        "train_loader.dataset.cache_limit=10gb",
        "train_loader.prefetch_factor=null",
        "eval_loader.dataset.remote=s3://bucket/heldout",
        "model.projector={pooler: null, mlp: null, type: linear}",
        "model.language_model.config={model_type: qwen2, hidden_size: 64, num_hidden_layers: 2}",
        "model.vision_encoder.name=open_clip/coca_ViT-L-14",
        "tokenizer.use_fast=false",
        "trainer.parallelism_config=null",
        "execution={activation_checkpointing: off, fusion: compile, loss_chunk: 512, row_multiple: 256}",
        "execution.activation_checkpointing=selective",
        "trainer.parallelism_config.fsdp.mixed_precision={param_dtype: bf16, reduce_dtype: fp32}",
        "trainer.max_duration=100ba",
        "trainer.max_duration=3",
        "trainer.eval_interval=0",
        "trainer.save_interval=30sec",
        "scheduler.t_warmup=0dur",
        "train_loader.dataset.epoch_size=50k",
        "train_loader.dataset.local=s3://bucket/shards",
        "execution.fusion=off",
        "model.vision_encoder={kwargs: {patch_size: 28}}",
        "callbacks.nan_monitor=null",
        "loggers={wandb: {project: histology, init_kwargs: {mode: offline}}, file: {}}",
        "variables.anything={of: [any, kind]}",
    ],
)
def test_what_the_libraries_accept_is_accepted(demo: Path, override: str) -> None:
    load_config(demo, [override])


def test_float8_is_for_a_frozen_language_model_that_is_not_sharded(demo: Path) -> None:
    float8, replicated = "execution.frozen_weights=float8", "trainer.parallelism_config=null"
    load_config(demo, [float8, replicated])
    trained = ["model.trainable=[projector,language_model]", "optimizer.lr=1.0e-3"]
    (problem,) = problems_of(demo, float8, replicated, *trained)
    assert "execution.frozen_weights: found float8; it must be null where language_model is trained" in problem
    (problem,) = problems_of(demo, float8, "trainer.parallelism_config={fsdp: {version: 2}}")
    assert "FSDP shards weights of one dtype; trainer.parallelism_config=null" in problem


def test_adaptive_clipping_is_refused_where_fsdp_1_would_refuse_it_at_the_first_step(demo: Path) -> None:
    clipping = "algorithms.gradient_clipping={clipping_type: adaptive, clipping_threshold: 0.1}"
    load_config(demo, [clipping])
    problem = problems_of(demo, clipping, "trainer.parallelism_config={fsdp: null}", *FSDP_1)[-1]
    assert problem.startswith("algorithms.gradient_clipping.clipping_type: found adaptive, which FSDP 1 can't")


@pytest.mark.parametrize(("version", "refused"), [("2.7.0", False), ("2.7.1+cu126", False), ("2.8.0", True)])
def test_fsdp_1_is_refused_by_name_where_torch_is_newer_than_2_7(
    demo: Path, version: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    fsdp_1 = ["trainer.parallelism_config={fsdp: null}", *FSDP_1]
    if not refused:
        load_config(demo, fsdp_1)
        return
    (problem,) = problems_of(demo, *fsdp_1)
    assert problem == (
        "trainer.parallelism_config.fsdp.version: 1 (FSDP1) is for torch 2.7, found torch 2.8.0; use version: 2, or "
        "null as fsdp for DDP"
    )


def test_ranks_must_divide_the_batch(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_config(demo, ["train_loader.global_batch_size=7"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    load_config(demo)
    [problem] = problems_of(demo, "train_loader.global_batch_size=7")
    assert problem.startswith("train_loader.global_batch_size: found 7, which 4 ranks don't divide; take 4, or another")
