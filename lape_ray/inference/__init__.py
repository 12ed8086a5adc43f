"""Use a trained checkpoint: evaluate, predict, export, serve.

evaluate     exact accuracy of a checkpoint of any origin
knn          accuracy of the nearest neighbours by a checkpoint's features
predict      a checkpoint as a classifier of image files
classify     the steps behind jobs/predict.py
export       `export`: every requested format of a checkpoint, MLflow's model among them
timm         a checkpoint as a folder that timm loads
official     a checkpoint in the names of its family's published code
backbone     a checkpoint as a feature extractor for detection and segmentation
backbone_module  that extractor, a file that is copied and knows no other
card         the model card of what is pushed to the hub
onnx         a checkpoint as ONNX, compared with PyTorch
serving      the model that MLflow serves
checkpoints  checkpoints and runs by what a person types, and a predictor of one
samples      a few images as evaluation sees them
"""
