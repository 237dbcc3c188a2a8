"""Difficult inputs of temperature_kl, shared by the tests of all backends."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

INF = float("inf")


@dataclass
class KLCase:
    name: str
    shape: tuple[int, ...]
    dim: int = -1
    temperature: float = 2.0
    rows_temperature: bool = False
    mask: bool = False
    normalizer: float | None = None
    direction: str = "forward"
    beta: float = 0.5
    reduction: str = "batchmean"
    scale_by_t2: bool = True
    include_entropy: bool = True
    target_eps: float = 0.0
    student_dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    noise: float = 1.0  # standard deviation of student - teacher
    spread: float = 2.0  # standard deviation of the teacher's logits
    edit: str = ""
    options: dict = field(init=False)

    def __post_init__(self):
        keys = ("dim", "direction", "beta", "reduction", "scale_by_t2", "include_entropy", "target_eps")
        self.options = {key: getattr(self, key) for key in keys}

    @property
    def rows(self) -> tuple[int, ...]:
        shape = list(self.shape)
        del shape[self.dim]
        return tuple(shape)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if torch.float64 in (self.student_dtype, self.teacher_dtype) else torch.float32

    def make(self, device: str = "cpu") -> dict[str, Tensor | None]:
        """Return student, teacher, temperature (per row or None), mask and normalizer.

        Logits are already rounded to their dtypes.
        """
        g = torch.Generator().manual_seed(sum(map(ord, self.name)))
        teacher = self.spread * torch.randn(self.shape, generator=g, dtype=torch.float64)
        student = teacher + self.noise * torch.randn(self.shape, generator=g, dtype=torch.float64)
        student, teacher = student.movedim(self.dim, -1).clone(), teacher.movedim(self.dim, -1).clone()
        mask = (torch.rand(self.rows, generator=g) > 0.4) if self.mask else None
        _edit(self.edit, student, teacher, mask)
        student, teacher = (x.movedim(-1, self.dim) for x in (student, teacher))
        student = _with_layout(self.layout, student.to(self.student_dtype).to(device))
        teacher = _with_layout(self.layout.replace("student_only_", ""), teacher.to(self.teacher_dtype).to(device))
        temperature = None
        if self.rows_temperature:
            temperature = (0.5 + 3 * torch.rand(self.rows, generator=g, dtype=torch.float64)).to(self.compute_dtype).to(device)
        normalizer = None if self.normalizer is None else torch.tensor(self.normalizer, dtype=torch.float64, device=device)
        return {
            "student": student,
            "teacher": teacher,
            "temperature": temperature,
            "mask": None if mask is None else mask.to(device),
            "normalizer": normalizer,
        }


def _edit(edit: str, s: Tensor, t: Tensor, mask: Tensor | None) -> None:
    """Change logits [..., C] in place."""
    if edit == "teacher_excludes":
        t[..., ::3] = -INF
    elif edit == "both_exclude":
        t[..., 1::2] = -INF
        s[..., 1::2] = -INF
    elif edit == "student_excludes":
        s[..., ::3] = -INF
    elif edit == "single_class_left":
        t[..., 1:] = -INF
        s[..., 1:] = -INF
    elif edit == "teacher_one_hot":
        t[..., 1:] = -INF
    elif edit == "far_apart":
        t[..., 0] += 300.0
        s[..., 1] += 400.0
    elif edit == "huge_gap":
        t[..., 0] += 4000.0
    elif edit == "offset":
        s += 25.0
    elif edit == "equal":
        s.copy_(t)
    elif edit == "finfo_min":
        t[..., 1::2] = torch.finfo(torch.float32).min
        s[..., 1::2] = torch.finfo(torch.float32).min
    elif edit == "ties":
        t.round_()
        s.round_()
    elif edit == "masked_nan":
        s[~mask] = float("nan")
        t[~mask] = INF
    elif edit:
        raise ValueError(edit)


def _with_layout(layout: str, x: Tensor) -> Tensor:
    """Return the same values with other strides."""
    if layout in ("contiguous", "student_only_contiguous"):
        return x.contiguous()
    if layout == "strided":  # every dimension has step 2
        big = x.new_full([2 * n + 1 for n in x.shape], 77.0)
        view = big[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    elif layout == "sliced":  # unit stride in the last dimension, but neither aligned nor dense
        big = x.new_full([n + 3 for n in x.shape], 77.0)
        view = big[tuple(slice(1, n + 1) for n in x.shape)]
    elif layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "student_only_strided":
        return _with_layout("strided", x)
    elif layout == "student_only_channels_last":
        return _with_layout("channels_last", x)
    elif layout == "expanded":  # the first sample, repeated
        return x[:1].expand_as(x)
    else:
        raise ValueError(layout)
    return view.copy_(x)


_F64, _BF16, _F16 = torch.float64, torch.bfloat16, torch.float16

KL_CASES = [
    KLCase("one_by_one", (1, 1)),
    KLCase("two_classes", (3, 2)),
    KLCase("odd", (5, 7), direction="reverse"),
    KLCase("vector", (11,)),
    KLCase("one_vector_exactly", (4, 16)),
    KLCase("one_more_than_a_vector", (4, 17), direction="jsd"),
    KLCase("cifar", (128, 100), temperature=4.0),
    KLCase("imagenet", (9, 1000), temperature=4.0, noise=0.05),
    KLCase("vocabulary", (3, 32003), temperature=4.0, noise=0.5),
    KLCase("close", (4, 5000), temperature=4.0, noise=0.005),
    KLCase("close_reverse", (4, 5000), temperature=4.0, noise=0.005, direction="reverse"),
    KLCase("close_jsd", (4, 5000), temperature=4.0, noise=0.005, direction="jsd", beta=0.3),
    KLCase("cold", (6, 50), temperature=0.3),
    KLCase("double", (6, 33), student_dtype=_F64, teacher_dtype=_F64),
    KLCase("double_reverse", (6, 33), student_dtype=_F64, teacher_dtype=_F64, direction="reverse", reduction="mean"),
    KLCase("double_jsd", (6, 33), student_dtype=_F64, teacher_dtype=_F64, direction="jsd", beta=0.9, reduction="sum"),
    KLCase("double_eps", (6, 33), student_dtype=_F64, teacher_dtype=_F64, target_eps=1e-3, rows_temperature=True),
    KLCase("bfloat16", (8, 130), student_dtype=_BF16, teacher_dtype=_BF16),
    KLCase("float16", (8, 130), student_dtype=_F16, teacher_dtype=_F16, direction="reverse"),
    KLCase("mixed_halves", (8, 45), student_dtype=_BF16, teacher_dtype=_F16),
    KLCase("mixed_single_half", (8, 45), teacher_dtype=_BF16, direction="jsd"),
    KLCase("mixed_double", (8, 45), student_dtype=_F16, teacher_dtype=_F64),
    KLCase("mixed_double_student", (8, 45), student_dtype=_F64),
    KLCase("map", (2, 21, 6, 7), dim=1, reduction="none"),
    KLCase("map_wide", (2, 21, 16, 19), dim=1),
    KLCase("map_mask", (2, 5, 9, 9), dim=1, mask=True, rows_temperature=True),
    KLCase("map_mask_nan", (2, 5, 9, 9), dim=1, mask=True, edit="masked_nan"),
    KLCase("map_bf16", (2, 21, 8, 9), dim=1, student_dtype=_BF16, teacher_dtype=_BF16),
    KLCase("map_jsd", (2, 21, 8, 9), dim=1, direction="jsd", beta=0.2, student_dtype=_F16),
    KLCase("map_far", (2, 5, 8, 9), dim=1, edit="far_apart", temperature=1.0),
    KLCase("map_channels_last", (2, 12, 6, 7), dim=1, layout="channels_last", direction="reverse"),
    KLCase("map_mixed_layouts", (2, 12, 6, 7), dim=1, layout="student_only_channels_last"),
    KLCase("map_strided", (2, 12, 6, 7), dim=1, layout="strided"),
    KLCase("map_sliced", (2, 12, 6, 11), dim=1, layout="sliced"),
    KLCase("classes_first", (13, 40), dim=0),
    KLCase("classes_first_few_rows", (13, 3), dim=0),
    KLCase("few_classes", (130, 33), direction="reverse", temperature=4.0),
    KLCase("few_classes_strided", (70, 21), layout="strided", student_dtype=_BF16, teacher_dtype=_BF16),
    KLCase("few_classes_jsd_mask", (67, 40), direction="jsd", beta=0.3, student_dtype=_F16, mask=True),
    KLCase("few_classes_double_eps", (66, 24), student_dtype=_F64, teacher_dtype=_F64, target_eps=1e-3, rows_temperature=True),
    KLCase("lanes", (83, 300), temperature=4.0),
    KLCase("lanes_one_more_than_a_vector", (66, 17), layout="strided", direction="reverse"),
    KLCase("lanes_sliced", (70, 150), layout="sliced", student_dtype=_BF16, teacher_dtype=_BF16),
    KLCase("lanes_mixed_halves", (70, 131), student_dtype=_BF16, teacher_dtype=_F16, rows_temperature=True),
    KLCase("lanes_float16_mask", (67, 100), student_dtype=_F16, direction="reverse", mask=True),
    KLCase("lanes_double", (67, 90), layout="transposed", student_dtype=_F64, teacher_dtype=_F64, direction="jsd"),
    KLCase("lanes_double_half", (67, 90), student_dtype=_F64, teacher_dtype=_F16),
    KLCase("lanes_far", (66, 100), edit="far_apart", temperature=1.0),
    KLCase("lanes_excludes", (66, 100), edit="teacher_excludes"),
    KLCase("lanes_masked_nan", (66, 100), mask=True, edit="masked_nan"),
    KLCase("lanes_none", (2, 40, 100), reduction="none", noise=0.05),
    KLCase("middle", (3, 4, 5, 2), dim=-2),
    KLCase("strided", (6, 37), layout="strided"),
    KLCase("strided_student_only", (6, 37), layout="student_only_strided"),
    KLCase("sliced", (6, 37), layout="sliced", direction="jsd"),
    KLCase("transposed", (20, 37), layout="transposed"),
    KLCase("expanded", (20, 37), layout="expanded"),
    KLCase("none", (4, 3, 19), reduction="none", rows_temperature=True),
    KLCase("none_jsd", (4, 3, 19), reduction="none", direction="jsd", mask=True),
    KLCase("sum", (4, 19), reduction="sum", scale_by_t2=False),
    KLCase("mean_mask", (14, 19), reduction="mean", mask=True),
    KLCase("normalizer", (14, 19), normalizer=37.0, mask=True),
    KLCase("masked_nan", (14, 19), mask=True, edit="masked_nan"),
    KLCase("cross_entropy", (14, 40), include_entropy=False, temperature=3.0),
    KLCase("cross_entropy_learnt_t", (14, 40), include_entropy=False, rows_temperature=True),
    KLCase("eps", (14, 100), target_eps=1e-7, temperature=3.0),
    KLCase("eps_large", (14, 41), target_eps=1e-2, rows_temperature=True, mask=True),
    KLCase("eps_cross_entropy", (14, 41), target_eps=1e-3, include_entropy=False),
    KLCase("eps_map", (2, 5, 3, 9), dim=1, target_eps=1e-3),
    KLCase("teacher_excludes", (7, 40), edit="teacher_excludes"),
    KLCase("teacher_excludes_eps", (7, 40), edit="teacher_excludes", target_eps=1e-3),
    KLCase("teacher_excludes_jsd", (7, 40), edit="teacher_excludes", direction="jsd"),
    KLCase("student_excludes_jsd", (7, 40), edit="student_excludes", direction="jsd", beta=0.3, rows_temperature=True),
    KLCase("student_excludes_jsd_map", (2, 7, 5, 4), dim=1, edit="student_excludes", direction="jsd"),
    KLCase("student_excludes_reverse", (7, 40), edit="student_excludes", direction="reverse", rows_temperature=True),
    KLCase("teacher_excludes_ce", (7, 40), edit="teacher_excludes", include_entropy=False, rows_temperature=True),
    KLCase("both_exclude", (7, 40), edit="both_exclude"),
    KLCase("both_exclude_reverse", (7, 40), edit="both_exclude", direction="reverse"),
    KLCase("both_exclude_jsd", (7, 40), edit="both_exclude", direction="jsd", rows_temperature=True),
    KLCase("both_exclude_ce", (7, 40), edit="both_exclude", include_entropy=False, rows_temperature=True),
    KLCase("single_class_left", (7, 40), edit="single_class_left"),
    KLCase("teacher_one_hot", (7, 40), edit="teacher_one_hot", rows_temperature=True),
    KLCase("far_apart", (7, 40), edit="far_apart", temperature=1.0),
    KLCase("far_apart_reverse", (7, 40), edit="far_apart", temperature=1.0, direction="reverse"),
    KLCase("far_apart_jsd", (7, 40), edit="far_apart", temperature=1.0, direction="jsd"),
    KLCase("huge_gap", (7, 40), edit="huge_gap", temperature=1.0, rows_temperature=True),
    KLCase("offset", (7, 40), edit="offset"),
    KLCase("finfo_min", (7, 40), edit="finfo_min"),
    KLCase("equal", (7, 40), edit="equal"),
    KLCase("ties", (7, 40), edit="ties"),
    KLCase("empty_batch", (0, 40)),
    KLCase("empty_map", (2, 5, 0, 3), dim=1, reduction="none"),
]
