"""Names of a YAML and the classes behind them."""

from __future__ import annotations

from composer_path.run.names import named_classes, snake_name


def test_class_names_become_the_words_of_the_yaml() -> None:
    names = (
        "SpeedMonitor",
        "OOMObserver",
        "NaNMonitor",
        "LRMonitor",
        "EMA",
        "StainJitter",
        "CosineAnnealingWithWarmup",
    )
    words = ["speed_monitor", "oom_observer", "nan_monitor", "lr_monitor", "ema", "stain_jitter", "cosine_with_warmup"]
    assert [snake_name(name) for name in names] == words


def test_our_own_classes_are_named_beside_composers() -> None:
    assert {"gradient_clipping", "stain_jitter"} <= set(named_classes("algorithms"))
    assert {"lr_monitor", "memory_monitor", "save_weights", "batch_report"} <= set(named_classes("callbacks"))
    assert {"tensorboard", "wandb", "mlflow", "file"} <= set(named_classes("loggers"))
    assert {"cosine_with_warmup", "linear_with_warmup", "constant"} <= set(named_classes("scheduler"))
