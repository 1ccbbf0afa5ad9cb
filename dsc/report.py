def finish(run_dir, task, trainer, data, config):
    print({k: float(v) for k,v in trainer.callback_metrics.items()})
    return {}
