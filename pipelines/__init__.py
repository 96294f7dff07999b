"""The motion: Ray, MLflow and the command line. The only place where `sae_core` and `feature_store` meet."""
