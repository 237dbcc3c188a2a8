"""Analyses of trained networks: which parts of an image they use, and how they learned to."""

from .agreement import MinibatchCKA, calibration_error, fidelity
from .concepts import (
    LearningSpeed,
    OptimizationStability,
    VisualConcepts,
    block_mask,
    bootstrap_interval,
    learning_speed,
    optimization_stability,
    suitable_images,
    visual_concepts,
    weight_distance,
)
from .pixel_entropy import PixelEntropy, pixel_entropy
from .recorder import KnowledgeRecord, KnowledgeRecorder
from .training import Training, TrainingKnowledge, knowledge_of_trainings, knowledge_table

__all__ = [
    "KnowledgeRecord",
    "KnowledgeRecorder",
    "LearningSpeed",
    "MinibatchCKA",
    "OptimizationStability",
    "PixelEntropy",
    "Training",
    "TrainingKnowledge",
    "VisualConcepts",
    "block_mask",
    "bootstrap_interval",
    "calibration_error",
    "fidelity",
    "knowledge_of_trainings",
    "knowledge_table",
    "learning_speed",
    "optimization_stability",
    "pixel_entropy",
    "suitable_images",
    "visual_concepts",
    "weight_distance",
]
