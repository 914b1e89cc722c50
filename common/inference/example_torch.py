"""Uses an exported model with torch alone, without Cloister: python THIS_FILE model.pt"""

import json
import sys

import torch
from torch import nn

saved = torch.load(sys.argv[1], weights_only=True)
about = json.loads(saved["cloister"])
activation = getattr(torch, json.loads(about["federation"])["model"]["activation"])
layers = [nn.Linear(1, 1) for name in saved["state_dict"] if name.endswith("weight")]
for i, layer in enumerate(layers):
    layer.weight = nn.Parameter(saved["state_dict"][f"layers.{i}.weight"])
    layer.bias = nn.Parameter(saved["state_dict"][f"layers.{i}.bias"])

x = torch.zeros(1, len(about["inputs"]))  # rows of inputs, each as `about["inputs"]` says
with torch.no_grad():
    for layer in layers[:-1]:
        x = activation(layer(x))
    logits = layers[-1](x)

print("\n".join(about["inputs"]))
print("with 0 for each of these, the model puts out", logits.tolist())
