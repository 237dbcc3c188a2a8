"""Small networks, images and training runs, for tests of training."""

import lightning as L
import torch
from torch import nn

from kdkernels.data import FromDatasets

IMAGES = [(torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(i)), i % 3) for i in range(12)]


class Small(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def data_of(images=IMAGES, **options):
    return FromDatasets(images, IMAGES, num_classes=3, **{"batch_size": 4} | options)


def fit(method, data=None, **options):
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False} | options
    trainer = L.Trainer(enable_progress_bar=False, enable_model_summary=False, **options)
    trainer.fit(method, data or data_of())
    return trainer


def loader_of(images, labels):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=4)
