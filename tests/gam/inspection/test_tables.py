"""The tables: every one explained, and shown in a notebook with everything escaped."""

from dataclasses import replace

import numpy as np
from helpers.inspection import adapter, inspect_updates, random_updates

from gam import inspect_adapters
from gam.inspection.tables import tables


def test_every_column_of_figures_is_explained_below_a_table():
    report = inspect_updates(random_updates(np.random.default_rng(0)))
    notes = ""
    for table in tables(report):
        assert {len(row) for row in table.rows} == {len(table.head)}
        assert all(len(note) <= 94 for note in table.notes)
        notes += " ".join(table.notes)
    for name in {name for table in tables(report) for name in table.head[3:]}:
        assert name.removeprefix("A ").removeprefix("B ") in notes


def test_only_the_last_table_of_groups_has_notes():
    updates = random_updates(np.random.default_rng(1))
    report = inspect_adapters(
        [adapter(name, {"x.0.q": updates[0], "x.1.q": updates[1]}) for name in "ab"]
    )
    found = {table.head[0]: bool(table.notes) for table in tables(report)}
    assert found == {
        "adapter": True,
        "updates": True,
        "spaces": True,
        "module": False,
        "layers": True,
    }
    (alone,) = tables(inspect_updates(updates[:1]))
    assert alone.head[0] == "adapter"


def test_html_is_escaped():
    one, two, _ = random_updates(np.random.default_rng(2))
    report = inspect_adapters([adapter("<a&b>", {"q": one}), adapter("b", {"q": two})])
    html = report._repr_html_()
    assert "<a&b>" not in html
    assert html.count("&lt;a&amp;b&gt;") >= 2
    assert html.count("<table>") == html.count("</table>") == 2
    assert "<li>" in html
    assert "<ul>" not in replace(report, advice=[])._repr_html_()


def test_repr_is_one_line():
    updates = random_updates(np.random.default_rng(3))
    text = repr(inspect_updates(updates))
    assert text.startswith("Inspection(adapters '0', '1', '2', 1 modules, cosine ")
    many = [adapter(f"a\n{number}", {"q": updates[0]}) for number in range(9)]
    text = repr(inspect_adapters(many))
    assert text == "Inspection(adapters 'a\\n0', 'a\\n1', 'a\\n2', ..., 1 modules, cosine 1 to 1)"
    assert repr(inspect_updates(updates[:1])) == "Inspection(adapters '0', 1 modules)"
