"""Pages escape their titles, embed figures, and are the same for the same content."""

from megagnn.drawing.figures import Drawn, make_axes
from megagnn.drawing.pages import figure, page, table


def drawn():
    made, (ax,) = make_axes()
    ax.plot([0, 1], [1, 2])
    return Drawn("a", "Loss & data", made, "one < two")


def test_a_page_is_whole_and_the_same_again():
    first, second = (page("a < b", [figure(drawn()), table(("x",), [("1",)])]) for _ in range(2))
    assert "<title>a &lt; b</title>" in first
    assert first.endswith("</body></html>\n")
    assert "Loss &amp; data" in first
    assert "one &lt; two" in first
    assert 'src="data:image/svg+xml;base64,' in first
    assert "<table><tr><th>x</th></tr><tr><td>1</td></tr></table>" in first
    assert len(first) == len(second)


def test_what_is_missing_is_told():
    assert figure(Drawn("a", "t", None, "no <runs>")) == '<h3>t</h3><p class="missing">no &lt;runs&gt;</p>'
