"""What `veneer data inspect` prints."""

import io

from rich.console import Console

from veneer.data.example import Example, Message
from veneer.data.inspect import inspect_data, render_inspection
from veneer.data.prepare import prepare


def test_text_is_shown_as_it_is_and_duplicates_are_counted(tokenizer):
    data = [
        Example(f"f:{i}", (Message("user", f"[red]markup[/red] {i // 2}"), Message("assistant", "größer 😀 日本")))
        for i in range(4)
    ]
    prepared = prepare(data, tokenizer, content_hash="x", cache_dir=None)
    found = inspect_data(data, prepared, tokenizer, heldout=[data[0], Example("h:1", completion="other")])
    assert found.duplicates == 2 and found.overlap == 1
    out = io.StringIO()
    render_inspection(found, Console(file=out, width=200), show=1)
    text = out.getvalue()
    assert "[red]markup[/red] 0" in text and "größer 😀 日本<|im_end|>" in text and "end-of-turn is trained" in text
