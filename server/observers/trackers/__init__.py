"""A run beside others, where people look at theirs: TensorBoard, MLflow."""
