"""Lanes as curves, and the metrics of CULane, TuSimple and BDD100K, compared with values computed
by hand.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torchmetrics")

from kdkernels.tasks import Lanes
from kdkernels.tasks.lane_curves import LaneMaps, culane_rows, draw_lanes, extract_columns, fill_gaps, tusimple_rows
from kdkernels.tasks.lane_metrics import CULaneF1, LaneIoU, LanePixelAccuracy, TuSimpleScore, count_matches, pairwise_iou, tusimple_scores

NAN = math.nan


def _maps(label, lanes=2, exists=None):
    """Return lanes that are certain: the probability of a lane is 1 in its pixels."""
    probability = torch.stack([label == lane for lane in range(1, lanes + 1)], 1).float()
    return LaneMaps(probability, exists, label)


def _vertical(columns, height=59, width=164):
    """Return a label map [1, H, W] with vertical lanes, 1 pixel wide; ``None``: no lane."""
    label = torch.zeros(1, height, width, dtype=torch.int64)
    for lane, column in enumerate(columns, 1):
        if column is not None:
            label[0, :, column] = lane
    return label


# Curves.


def test_rows_of_the_benchmarks():
    assert culane_rows(590) == list(range(589, 248, -20))
    assert culane_rows(59) == list(range(58, 23, -2))
    assert tusimple_rows(720) == list(range(160, 720, 10))
    assert len(tusimple_rows(36)) == 28  # 8, 8.5, 9, ...: every row from 8 to 35, rounded to even numbers in the middle, and 36 does not exist
    assert all(0 <= row < height for height in (1, 2, 8, 64) for rows in (culane_rows(height), tusimple_rows(height)) for row in rows)


def test_points_are_the_columns_of_the_largest_probability():
    probability = torch.zeros(1, 3, 3, 5)
    probability[0, 0, 0, 3] = 0.9
    probability[0, 0, 1] = torch.tensor([0.1, 0.31, 0.2, 0.0, 0.3])
    probability[0, 0, 2, 1] = 0.3  # not above the threshold
    probability[0, 1, 0, 2] = 0.8  # a lane with one point has none
    probability[0, 2, :2, 1:4] = 1.0  # the middle of a band, as in a label map
    columns = extract_columns(probability, [2, 1, 0])
    expected = torch.tensor([[[NAN, 1.0, 3.0], [NAN] * 3, [NAN, 2.0, 2.0]]])
    torch.testing.assert_close(columns, expected, equal_nan=True)
    columns = extract_columns(probability, [2, 1, 0], torch.tensor([[False, True, True]]))
    torch.testing.assert_close(columns[0, :2], torch.full((2, 3), NAN), equal_nan=True)


def test_gaps_are_interpolated_over_the_rows():
    columns = torch.tensor([[NAN, 1.0, NAN, NAN, 7.0, NAN], [NAN] * 6, [2.0, NAN, 4.0, 5.0, NAN, NAN]])
    filled = fill_gaps(columns, [10, 8, 7, 6, 2, 0])  # from row 8 to row 2, the column grows by 1 per row
    expected = torch.tensor([[NAN, 1.0, 2.0, 3.0, 7.0, NAN], [NAN] * 6, [2.0, 2 + 4 / 3, 4.0, 5.0, NAN, NAN]])
    torch.testing.assert_close(filled, expected, equal_nan=True)


def test_a_vertical_line_has_the_given_width():
    mask = draw_lanes(torch.tensor([[5.0, 5.0]]), [6, 2], 10, 11, 3.0)[0]
    assert mask[2:7, 4:7].all()  # 1.5 pixels to each side
    ends = torch.zeros(10, 11, dtype=torch.bool)
    ends[1, 4:7] = ends[7, 4:7] = True  # sqrt(2) < 1.5: round ends
    expected = ends.clone()
    expected[2:7, 4:7] = True
    assert torch.equal(mask, expected)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.one_of(st.none(), st.floats(-3, 20)), min_size=3, max_size=5), st.floats(1, 6), st.booleans())
def test_drawing_matches_the_distance_from_the_segments(points, line_width, descending):
    rows = [1 + 3 * i for i in range(len(points))]
    if descending:
        rows = rows[::-1]
    mask = draw_lanes(torch.tensor([[NAN if x is None else x for x in points]]), rows, 14, 16, line_width)[0]
    known = [(x, y) for x, y in zip(points, rows, strict=True) if x is not None]
    for y in range(14):
        for x in range(16):
            distance = math.inf
            for (ax, ay), (bx, by) in itertools.pairwise(known):
                along = min(1.0, max(0.0, ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)))
                distance = min(distance, math.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay)))
            if abs(distance - line_width / 2) > 1e-4:
                assert bool(mask[y, x]) == (distance < line_width / 2)


# F1 of CULane. In images of width 164, the lines are 3 pixels wide: 1 pixel to each side.


def test_f1_of_vertical_lanes():
    """Lane 1 is shifted by 1 column: its IoU is 2 / 4. Lane 2 is shifted by 2: its IoU is 1 / 5."""
    predicted, labelled = _maps(_vertical([41, 102])), _maps(_vertical([40, 100]))
    metric = CULaneF1()
    metric.update(predicted, labelled)
    assert [int(metric.matched), int(metric.predicted), int(metric.labelled)] == [1, 2, 2]
    assert metric.compute().item() == 0.5
    metric.update(_maps(_vertical([None, 100])), labelled)  # precision 2 / 3, recall 2 / 4
    assert metric.compute().item() == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    metric.update(_maps(_vertical([40, 100]), exists=torch.tensor([[True, False]])), labelled)
    assert metric.compute().item() == pytest.approx(2 * 3 / (4 + 6))


def test_f1_ignores_the_numbers_of_the_lanes():
    metric = CULaneF1()
    metric.update(_maps(_vertical([100, 40])), _maps(_vertical([40, 100])))
    assert metric.compute().item() == 1.0


def test_line_width_is_scaled_to_the_images():
    """In images of width 1640, lines are 30 pixels wide, 15 on each side of their centre and the
    centre itself. Apart from the round ends, a shift of s columns has the IoU (31 - s) / (31 + s),
    which is 0.5 for s = 10.3.
    """
    values = []
    for shift in (9, 12):
        metric = CULaneF1()
        metric.update(_maps(_vertical([800 + shift], 590, 1640), 1), _maps(_vertical([800], 590, 1640), 1))
        values.append(metric.compute().item())
    assert values == [1.0, 0.0]


def test_lanes_are_matched_one_to_one_by_the_largest_sum_of_ious():
    lanes = torch.zeros(3, 1, 12, dtype=torch.bool)
    lanes[0, 0, 0:6] = lanes[1, 0, 2:8] = lanes[2, 0, 8:12] = True

    def count(predicted, labelled):
        return count_matches(pairwise_iou(predicted[None], labelled[None])[0])

    torch.testing.assert_close(pairwise_iou(lanes[None, :2], lanes[None])[0], torch.tensor([[1, 0.5, 0], [0.5, 1, 0]]))
    assert count(lanes[:1], lanes[:2]) == 1
    assert count(lanes[[0, 0]], lanes[:2]) == 2  # IoU 1 and 4 / 8
    assert count(lanes[[0, 0]], lanes[[0, 2]]) == 1
    nothing = torch.zeros_like(lanes)
    assert count(nothing, lanes) == count(lanes, nothing) == count(nothing, nothing) == 0
    # A greedy assignment would take the pair with the largest IoU, 4 / 7, and then a pair that does
    # not overlap. The two other pairs have the IoUs 3 / 6 and 3 / 6, whose sum is larger.
    predicted, labelled = torch.zeros(2, 2, 1, 12, dtype=torch.bool)
    for mask, pixels in ((predicted[0], range(6)), (predicted[1], (0, 1, 6, 10)), (labelled[0], (0, 1, 2, 3, 6)), (labelled[1], (2, 4, 5))):
        mask[0, list(pixels)] = True
    assert count(predicted, labelled) == 2


# Scores of TuSimple. In images of 72 x 128 pixels, rows are 16 to 71, and 2 columns are 20 pixels.


def _tusimple(predicted, labelled, **options):
    metrics = [TuSimpleScore(name, **options) for name in ("accuracy", "false_positives", "false_negatives")]
    for p, t in zip(predicted, labelled, strict=True):
        for metric in metrics:
            metric.update(p, t)
    return [metric.compute().item() for metric in metrics]


def test_tusimple_scores_of_vertical_lanes():
    size = {"height": 72, "width": 128}
    labelled = _maps(_vertical([30, 90], **size))
    assert _tusimple([labelled], [labelled]) == [1.0, 0.0, 0.0]
    shifted = _maps(_vertical([31, 92], **size))  # by 10 and by 20 pixels: 20 is not below the threshold
    assert _tusimple([shifted], [labelled]) == [0.5, 0.5, 0.5]
    assert _tusimple([_maps(_vertical([None, None], **size))], [labelled]) == [0.0, 0.0, 1.0]
    assert _tusimple([shifted, labelled], [labelled, labelled]) == [0.75, 0.25, 0.25]


def test_second_predictions_of_a_lane_are_false_positives():
    """Of several predictions of a lane, the best one is right."""
    rows = torch.arange(160.0, 720, 10)
    labelled = torch.full((1, 2, 56), NAN)
    labelled[0, 0] = 640.0
    predicted = torch.full((1, 3, 56), NAN)
    predicted[0, 0], predicted[0, 1] = 645.0, 650.0
    predicted[0, 0, 53:] = NAN  # found, but with fewer points than the second prediction
    for variant in ("points", "script"):
        assert [x.item() for x in tusimple_scores(predicted, labelled, rows, variant=variant)] == [1.0, 0.5, 0.0]
    both = labelled.clone()
    both[0, 1] = 655.0  # one prediction finds two labelled lanes
    assert [x.item() for x in tusimple_scores(predicted[:, 1:], both, rows)] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("variant", ["points", "script"])
def test_scores_without_places_for_lanes(variant):
    rows = torch.arange(160.0, 720, 10)
    some, none = torch.full((2, 1, 56), 640.0), torch.empty(2, 0, 56)
    assert tusimple_scores(some, none, rows, variant=variant)[1].tolist() == [1.0, 1.0]
    assert tusimple_scores(none, some, rows, variant=variant)[2].tolist() == [1.0, 1.0]
    assert tusimple_scores(none, none, rows, variant=variant)[1].tolist() == [0.0, 0.0]


def test_points_of_a_lane_are_counted():
    """A label of 40 points, of which a prediction has 36 (90 %, found) or 32 (80 %, not found)."""
    labelled, rows = torch.full((1, 1, 56), NAN), torch.arange(160.0, 720, 10)
    labelled[0, 0, 10:50] = 600.0
    for points, found in ((36, True), (34, True), (32, False)):
        predicted = labelled.clone()
        predicted[0, 0, 10 + points :] = NAN
        accuracy, false_positives, false_negatives = tusimple_scores(predicted, labelled, rows)
        assert accuracy.item() == pytest.approx(points / 40)
        assert (false_positives.item(), false_negatives.item()) == ((0, 0) if found else (1, 1))
        # The script also counts the 16 rows at which both have no point.
        accuracy, false_positives, false_negatives = tusimple_scores(predicted, labelled, rows, variant="script")
        assert accuracy.item() == pytest.approx((points + 16) / 56)
        assert false_negatives.item() == ((points + 16) / 56 < 0.85)


def test_the_threshold_grows_with_the_slope_of_the_lane():
    """For a lane with the slope k = 3/4 columns per row, 1 / cos(angle) is 5/4: 25 pixels."""
    rows = torch.arange(160.0, 720, 10)
    labelled = (100 + 0.75 * rows).view(1, 1, -1)
    for shift, accuracy in ((24.9, 1.0), (25.1, 0.0), (-24.9, 1.0), (-25.1, 0.0)):
        assert tusimple_scores(labelled + shift, labelled, rows)[0].item() == accuracy


def test_script_leaves_out_the_worst_of_five_lanes():
    rows = torch.arange(160.0, 720, 10)
    labelled = (torch.arange(5.0) * 200 + 100).view(1, 5, 1).expand(1, 5, 56)
    accuracy, false_positives, false_negatives = tusimple_scores(labelled[:, :4], labelled, rows, variant="script")
    assert (accuracy.item(), false_positives.item(), false_negatives.item()) == (1.0, 0.0, 0.0)
    three = tusimple_scores(labelled[:, :3], labelled, rows, variant="script")
    assert [value.item() for value in three] == [0.75, 0.0, 0.25]
    assert [value.item() for value in tusimple_scores(labelled, labelled[:, :2], rows, variant="script")] == [0.0, 0.0, 1.0]
    points = tusimple_scores(labelled[:, :4], labelled, rows)
    assert [value.item() for value in points] == pytest.approx([0.8, 0.0, 0.2])


# Pixel metrics.


def test_pixel_metrics_match_values_computed_by_hand():
    label = torch.tensor([[[1, 1, 0, 2], [0, 0, 2, 2]]])
    predicted = torch.tensor([[[1, 2, 1, 0], [0, 0, 2, 0]]])
    iou, accuracy = LaneIoU(), LanePixelAccuracy()
    for metric in (iou, accuracy):
        metric.update(_maps(predicted), _maps(label))
    assert iou.compute().item() == pytest.approx(3 / 6)  # the number of the lane does not matter
    assert accuracy.compute().item() == pytest.approx(3 / 5)


# All metrics.

METRICS = {"f1", "tusimple_accuracy", "tusimple_false_positives", "tusimple_false_negatives", "lane_iou", "pixel_accuracy"}


def _values(task, *batches):
    metrics = task.metrics(task.lanes + 1)
    for logits, label in batches:
        prediction, target = task.output_metric_inputs(logits, {"label": label})
        for metric in metrics.values():
            metric.update(prediction, target)
    return {name: metric.compute().item() for name, metric in metrics.items()}


def _logits(label, classes=3):
    return 20 * torch.nn.functional.one_hot(label, classes).permute(0, 3, 1, 2).float()


@pytest.mark.filterwarnings("ignore:.*was called before.*")
def test_images_without_lanes_or_without_predictions():
    lanes, nothing = _vertical([40, 100]), _vertical([None, None])
    task = Lanes(lanes=2)
    assert set(task.metrics(3)) == METRICS
    zeros = dict.fromkeys(METRICS, 0.0)
    assert _values(task) == zeros  # no image
    assert _values(task, (_logits(nothing), nothing)) == zeros
    assert _values(task, (_logits(nothing), lanes)) == zeros | {"tusimple_false_negatives": 1.0}
    assert _values(task, (_logits(lanes), nothing)) == zeros | {"tusimple_false_positives": 1.0}
    perfect = _values(task, (_logits(lanes), lanes))
    assert perfect == {name: 0.0 if "_false_" in name else 1.0 for name in METRICS}
    # An image without lanes does not change the accuracy.
    assert _values(task, (_logits(lanes), lanes), (_logits(nothing), nothing)) == perfect


def test_metrics_do_not_depend_on_the_batches():
    label = torch.cat([_vertical([10 + i, 40 - i], 24, 64) for i in range(6)])
    logits = _logits(torch.cat([_vertical([10 + i + i % 2, 40 - i - i // 4], 24, 64) for i in range(6)]))
    task = Lanes(lanes=2)
    whole = _values(task, (logits, label))
    assert all(0 < whole[name] < 1 for name in ("f1", "tusimple_accuracy", "lane_iou", "pixel_accuracy"))
    parts = _values(task, *((logits[i : i + 2], label[i : i + 2]) for i in range(0, 6, 2)))
    assert parts == pytest.approx(whole, rel=1e-6)


def test_ignored_pixels_and_absent_lanes_do_not_count():
    label = _vertical([40, 100])
    logits = _logits(_vertical([40, 120]))
    ignored = label.clone()
    ignored[:, :, 90:] = 255
    task = Lanes(lanes=2)
    assert _values(task, (logits, ignored)) == {name: 0.0 if "_false_" in name else 1.0 for name in METRICS}
    output = {"logits": logits, "existence": torch.tensor([[2.0, -2.0]])}
    values = _values(task, (output, label))
    assert values["f1"] == pytest.approx(2 / 3)  # one predicted lane, which is right, of two
    assert (values["tusimple_false_positives"], values["tusimple_false_negatives"]) == (0.0, 0.5)


def test_one_class_for_all_lanes_has_pixel_metrics_only():
    task = Lanes(lanes=1)
    assert set(task.metrics(2)) == {"lane_iou", "pixel_accuracy"}
    assert (task.main_metric, Lanes().main_metric) == ("lane_iou", "f1")
    with pytest.raises(ValueError, match="score must be one of"):
        TuSimpleScore("precision")
    with pytest.raises(ValueError, match='variant must be "points" or "script"'):
        TuSimpleScore(variant="other")
