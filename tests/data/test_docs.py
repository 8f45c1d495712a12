"""The Python in docs/data.md runs as it stands."""

import re
from pathlib import Path

from opensora import store

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, videos, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").symlink_to(videos)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out
    assert "6 of 6 rows are used" in printed
    assert printed.count("(4, 3, 17, 64, 64)") == 3
    assert "{'step': 10}" in printed
    assert store.is_complete(tmp_path / "runs" / "demo" / "step-10")


def test_the_page_shows_a_config_that_validates():
    from opensora import config
    from opensora.data.buckets import BucketsConfig, levels

    (text,) = re.findall(
        r"```yaml\nbuckets:\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    found = config.validate(BucketsConfig, config.parse_yaml(text, "page"), where="page")
    assert len(levels(found, stride=(4, 8, 8), patch=(1, 2, 2))) == 2
