"""Use a trained checkpoint: evaluate, predict, export, serve.

evaluate     exact accuracy of a checkpoint of any origin
predict      a checkpoint as a classifier of image files
export       a checkpoint as timm's folder, as ONNX, as a model in MLflow
serving      the model that MLflow serves
checkpoints  checkpoints and runs by what a person types
samples      a few images as evaluation sees them
"""
