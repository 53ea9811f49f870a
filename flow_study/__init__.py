__version__ = "0.1.0"

# Public names by module. They are imported when first used (PEP 562), so that `import flow_study` costs nothing and
# what needs no torch does not load it.
_public = {
    'config': 'TrainingConfig ProtocolWarning',
    'files': 'WriteError',
    'draws': 'keyed_generator',
    'data': 'DataError FlowDataset NormalizationStats create_dataloader load_all_splits make_splits save_splits',
    'corpus': 'build_corpus encode_texts register_encoder',
    'paths': 'Flow build_flow create_flow load_pairs register_flow register_source transport_report',
    'augment': 'create_augment register_augment',
    'views': 'Table',
    'closed_form': 'HeldOutLoss ValidationBank Yardsticks held_out_loss loss_by_t plot_yardsticks verdict yardsticks',
    'layers': 'register_model scaled_width',
    'mlp': 'ResidualMLP SimpleVelocityNet VelocityMLP',
    'dit': 'DiT',
    'unet': 'VectorUNet',
    'mamba': 'VelocityMamba',
    'precond': 'Preconditioned',
    'models': 'build_model create_model parameter_counts',
    'early_stopping': 'EarlyStopping',
    'ema': 'EMAModel',
    'power_ema': 'PowerEMA',
    'schedule': 'get_cosine_schedule_with_warmup',
    'checkpoint': 'CheckpointError get_checkpoint_path load_checkpoint load_checkpoint_with_stats_check load_model save_checkpoint',
    'sampling': 'SolverError cfg_zero_star conditioned guided log_likelihood make_pairs nearest_texts sample shifted_grid solve uniform_grid',
    'metrics': 'compare_samples energy_distance evaluate measure mmd register_metric sliced_wasserstein',
    'device': 'GPUError choose_gpu gpu_readings list_gpus pick_device set_seed verify_gpu',
    'rundir': 'RunDirError RunLockedError read_metrics read_status request',
    'runs': 'list_runs prune_runs',
    'tracking': 'ProgressTracker Tracker WandbTracker',
    'trainer': 'FlowTrainer NonFiniteError choose_average',
    'ensemble': 'Ensemble train_ensemble',
    'statistics': 'compare_arms mean_ranks paired_test plot_ranks seed_interval seeds_needed',
    'engines': 'Engine register_engine',
    'ray_engine': 'EngineError RayEngine',
    'study': 'Leaderboard Results Study expand_grid',
    'reader': 'Run',
    'dashboard': 'Dashboard',
}
_where = {name: module for module, names in _public.items() for name in names.split()}
__all__ = sorted(_where)


def __getattr__(name):
    "Import a public name from its module"
    if name not in _where: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    value = globals()[name] = getattr(import_module(f'{__name__}.{_where[name]}'), name)
    return value


def __dir__():
    return sorted({*globals(), *_where})
