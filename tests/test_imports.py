"""What a machine with nothing but torch and numpy can do, and what an import must not cost."""

import subprocess
import sys

CODE = """
import sys
for name in ("cv2", "pycocotools", "matplotlib", "PIL", "tyro", "tqdm", "tensorboard"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
import rtmdet_fast.ops
from rtmdet_fast import RTMDet
from rtmdet_fast.models.rtmdet.detection_head import Targets
model = RTMDet("nano", num_classes=2)
targets = Targets(torch.tensor([[[4.0, 4, 30, 40]]]), torch.tensor([[1]]), torch.tensor([1]))
losses = model(torch.randn(1, 3, 64, 64), targets)
sum(losses.values()).backward()
found = model.detect(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [(1.0, 1.0)], [(64, 64)])
assert len(found) == 1
print("fine")
"""


def test_models_losses_and_detection_need_only_torch_and_numpy():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr
