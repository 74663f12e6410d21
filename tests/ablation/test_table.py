"""The arithmetic of an ablation by hand, and its tables."""

from PIL import Image

from flaxkd.ablation import table


# By hand: mean 3, deviations -2, 0, 2, variance 8 / 2.
def test_mean_and_deviation_of_a_sample():
    assert table.of([1.0, 3.0, 5.0]) == {"mean": 3.0, "sd": 2.0, "values": [1.0, 3.0, 5.0]}
    assert table.of([7.0]) == {"mean": 7.0, "sd": None, "values": [7.0]}


def test_the_best_is_one_that_leads_by_more_than_the_spread():
    found = {"a": table.of([1.0, 3.0]), "b": table.of([4.0, 6.0]), "c": table.of([9.0, 11.0])}
    assert table.best(found, min) == "a"  # 2 ± 1.41 and 5 ± 1.41 are apart by 0.17
    assert table.best(found, max) == "c"
    found["b"] = table.of([3.5, 5.5])  # 4.5 ± 1.41 overlaps
    assert table.best(found, min) is None and table.best(found, max) == "c"
    assert table.best({"a": table.of([1.0]), "b": table.of([2.0])}, min) is None


def test_a_curve_is_the_mean_over_seeds():
    runs = [[{"step": 0, table.CURVE: 1.0}, {"step": 10, "loss": 5.0}, {"step": 20, table.CURVE: 0.5}]]
    runs += [[{"step": 0, table.CURVE: 2.0}, {"step": 20, table.CURVE: 0.25}]]
    assert table.curve(runs) == [[0, 1.5], [20, 0.375]]


def row(error: float, psnr: float) -> dict:
    return dict.fromkeys(table.MEASURES, error) | {"psnr": psnr}


def test_the_result_is_tables_and_a_picture(tmp_path):
    rows = {"sd_tiny": {"noise": [row(0.3, 20.0), row(0.32, 21.0)], "output": [row(0.1, 20.5), row(0.12, 21.5)]}}
    records = [[{"step": 0, table.CURVE: 0.4}, {"step": 300, table.CURVE: 0.1}]] * 2
    curves = {"sd_tiny": {"noise": records, "output": []}}
    variants = {
        "noise": {"init": "teacher", "weight.output": 0.0},
        "output": {"init": "teacher", "weight.output": 1.0},
    }
    settings = {"command": "python", "steps": 300, "batch size": 16, "seeds": 2}
    paths = table.write(tmp_path, table.result(settings, variants, {"loss_noise": 0.25}, rows, curves))
    text = paths[0].read_text()
    assert "| variant | loss_noise | loss_output | features | PSNR |" in text
    assert "| teacher | 0.2500 | – | – | – |" in text
    assert "| noise | 0.3100 ± 0.0141 | 0.3100 ± 0.0141 | 0.3100 ± 0.0141 | 20.50 ± 0.71 |" in text
    assert "| output | **0.1100 ± 0.0141** |" in text and "| 21.00 ± 0.71 |" in text  # 0.5 dB are within the spread
    assert "| output | teacher | 1.0 |" in text and "| steps | 300 |" in text
    with Image.open(paths[2]) as picture:
        assert min(picture.size) > 500
