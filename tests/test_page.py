"""The page of a run: sound HTML in one file, and how a real browser shows it."""

import json
import re
import shutil
import subprocess
from base64 import b64decode
from html import escape, unescape
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from dsc import figures, markup, page
from dsc.details import Details
from dsc.gallery import Film, Gallery

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
VOID = {"meta", "link", "img", "br"}
DARK = "--blink-settings=preferredColorScheme=0"
SECTIONS = ["configuration", "learning", "layers", "convergence", "dictionary", "images", "confusion", "groups"]


def source(name="digits/1", classes=10, grouped=True, seed=0):
    torch.manual_seed(seed)
    names = [f"class {i}" for i in range(classes)]
    examples = [dict(index=i, label=names[i], predicted=names[i // 2], probability=None) for i in range(2)]
    confusion = (torch.eye(classes) * 40 + torch.rand(classes, classes) * 25).long().tolist()
    details = Details(
        names, confusion, grouped, examples, {"coder": 12}, {"steps/coder": 3.0, "rate/coder": 0.9, "error/coder": 0.2},
        use=torch.rand(12).tolist(), groups=torch.rand(classes, 3).softmax(1).tolist() if grouped else None,
        group_order=[2, 0, 1] if grouped else None,
        clustering=[dict(method="k-means", images=50, accuracy=0.5, nmi=0.4, ari=0.3)] if grouped else None,
    )  # fmt: skip
    frames = torch.rand(3, 2, 1, 8, 8)
    film = Film("coder", 2, [1, 2, 4], frames, frames[0], torch.rand(3, 2))
    test = {"accuracy": 0.9876, "loss": 0.1, "sparsity/active_fraction/total": 0.25}
    test |= {"sparsity/active_fraction/coder": 0.25, "sparsity/dead_fraction/coder": 0.25, "sparsity/hoyer/coder": 0.5}
    curve = {"layer": "coder", "errors": {"1": 0.9, "2": 0.5, "4": 0.1, "8": 0.01, "16": 0.001, "32": 0.0}}
    summary = {"dataset": "digits", "seed": seed, "parameters": 12345, "test": test}
    summary["convergence"] = [curve | {"solver": solver, "rate": 0.5} for solver in ("ista", "fista")]
    config = {"seed_everything": seed, "trainer": {"max_epochs": 3, "logger": None}}
    config["model"] = {"class_path": "dsc.tasks.Classifier", "init_args": {"model": "dsc_cnn", "threshold": 0.1 + seed}}
    logged = {name: [(0, 1.0), (1, 0.5)] for name in ("train/loss", "val/loss", "val/accuracy")}
    logged |= {f"sparsity/active_fraction/{k}": [(0, 0.9), (1, 0.5)] for k in ("coder", "total")}
    shown = Gallery(frames[1], "coder", torch.randn(2, 12).relu(), 4 if grouped else 1, film)
    atoms = torch.randn(12, 1, 8, 8)
    return page.Source(
        name, "dsc_cnn", "ReLU", summary, config, logged, details, shown, atoms, 4 if grouped else 1
    )  # fmt: skip


def bare():
    """A network without a sparse layer, never trained."""
    details = Details(["a", "b"], [[1, 0], [1, 0]], False, [dict(index=0, label="a", predicted="a", probability=0.75)],
                      {}, {})  # fmt: skip
    summary = {"dataset": "digits", "seed": 0, "parameters": 5, "test": {"accuracy": 0.5}, "convergence": []}
    gallery = Gallery(torch.rand(1, 3, 8, 8))
    return page.Source("bare", "resnet18", "none", summary, {}, {}, details, gallery, None, 1)


class Reader(HTMLParser):
    """The tree's elements, and whether every one that opens also closes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def pair():
    return page.page([source(), source("other/2", grouped=False, seed=1)])


@pytest.mark.parametrize("sources", [[source()], [source(), source("b/2", seed=1)], [bare()], [source(), bare()]])
def test_a_page_is_sound_and_of_one_file(sources):
    text = page.page(sources)
    read = Reader(text)
    names = [a["id"] for _, a in read.elements if "id" in a]
    assert len(names) == len(set(names))
    links = [a["href"] for a in read.all("a")] + [a["xlink:href"] for a in read.all("use")]
    links += [f"#{name}" for _, a in read.elements for name in a.get("aria-labelledby", "").split()]
    links += re.findall(r"url\((#[^)]+)\)", text)
    assert links and all(link[0] == "#" and link[1:] in names for link in links)
    outside = [a[key] for tag, a in read.elements if tag != "a" for key in ("src", "href") if key in a]
    assert all(place.startswith("data:") for place in outside) and "@import" not in text
    assert not read.all("script") and not any(key.startswith("on") for _, a in read.elements for key in a)
    assert all(a["alt"] for a in read.all("img")) and all(a["aria-label"] for a in read.all("svg"))
    assert all("scope" in a for a in read.all("th"))
    assert len(read.all("h1")) == len(read.all("main")) == len(read.all("nav")) == 1
    assert read.elements[[t for t, _ in read.elements].index("a")][1] == {"class": "skip", "href": "#main"}


def test_sections_without_meaning_are_absent():
    assert [a["id"] for a in Reader(page.page([source()])).all("section")] == SECTIONS
    assert [a["id"] for a in Reader(page.page([bare()])).all("section")] == ["configuration", "images", "confusion"]
    both = page.page([source(), bare()])
    assert both.count("This has no meaning for this model.") == 4
    assert "active groups" not in both  # a column that would be empty


def test_a_page_shows_its_figures():
    text = " ".join(Reader(page.page([source()])).text)
    for figure in ("98.76 %", "25.0 %", "3 of 12", "12,345", "0.9000", "0.200", "k-means", "50.0 %"):
        assert figure in text, figure
    assert "max_epochs" in text and "logger: null" in text


def test_two_are_compared_by_what_differs():
    read = Reader(page.page([source(), source("b/2", seed=1)]))
    text = " ".join(read.text)
    assert "threshold 0.1 1.1" in text and "max_epochs 3" not in text.split("YAML")[0]
    assert len([a for a in read.all("p") if a.get("class") == "which"]) == 2 * 6


def test_names_are_text_and_never_markup():
    text = page.page([source("<script>alert(1)</script>&")])
    assert "<script>" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in text


def test_numbers_are_written_as_they_are_exact():
    assert [markup.number(v) for v in (None, 0.0, 0.5, 1e-3, 9e-4)] == ["", "0.0000", "0.5000", "0.0010", "9.0e-04"]
    assert markup.percent(0.98765) == "98.77 %" and markup.percent(None) == ""


def test_many_classes_make_a_picture():
    assert len(page.page([source(classes=100)])) < 400_000
    assert '<table class="matrix"' not in page.confusion(source(classes=100))


# Pictures


def pixels(uri):
    kind, data = uri.split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(BytesIO(b64decode(data))))


def test_photos_keep_every_pixel():
    image = torch.rand(3, 5, 7)
    assert np.array_equal(pixels(figures.photo(image)), (image * 255).round().byte().permute(1, 2, 0).numpy())
    grey = pixels(figures.photo(image[:1]))
    assert grey.shape == (5, 7, 3) and (grey[..., 0] == grey[..., 2]).all()


def test_atoms_lie_in_rows_with_clear_gaps():
    atoms = torch.zeros(3, 1, 2, 2)
    atoms[0, 0, 0, 0], atoms[1, 0, 1, 1] = 5.0, -0.5
    sheet = pixels(figures.atom_sheet(atoms, columns=2))
    assert sheet.shape == (5, 5, 4)
    assert (sheet[2, :, 3] == 0).all() and (sheet[:, 2, 3] == 0).all() and (sheet[3:, 3:, 3] == 0).all()
    assert sheet[0, 0].tolist() == [255] * 4 and sheet[1, 4].tolist() == [0, 0, 0, 255]  # each in its own range
    assert sheet[3, 0].tolist() == [128, 128, 128, 255]  # grey is zero


def test_codes_are_clear_where_they_are_zero():
    code = torch.tensor([0.0, 4.0, -1.0, 0.0, 0.0, 0.0])
    uri, shape = figures.code_picture(code, group_size=3)
    drawn = pixels(uri)
    assert shape == (2, 3) == drawn.shape[:2]  # a row a group
    assert drawn[..., 3].tolist() == [[0, 255, 128], [0, 0, 0]]  # the root of the share of the largest
    assert drawn[0, 1, :3].tolist() == list(figures.POSITIVE) and drawn[0, 2, :3].tolist() == list(figures.NEGATIVE)
    assert figures.code_picture(code, 1)[1] == (2, 3)  # as square as may be


def test_the_strongest_maps_are_shown():
    maps = torch.zeros(20, 3, 3)
    maps[7], maps[4] = 2.0, -1.0
    uri, (height, width) = figures.code_picture(maps, 1, maps=2)
    drawn = pixels(uri)
    assert (height, width) == (9, 5) == drawn.shape[:2]  # two rows of one, with gaps around
    assert drawn[1:4, 1:4, 3].min() == 255 and drawn[5:8, 1:4, 3].max() == 180
    assert figures.code_picture(torch.rand(6, 9), 1)[1] == figures.code_picture(torch.rand(6, 3, 3), 1)[1]  # tokens


def test_drawings_take_their_colours_from_the_page():
    drawn = figures.epochs_panel({f"line {i}": [(0, 1.0), (1, i)] for i in range(8)}, 'a "quoted" label')
    assert "currentColor" in drawn and all(f"var(--line-{i})" in drawn for i in range(8))
    assert not re.search(r"#[0-9a-f]{6}\b(?!\))", re.sub(r"(?:href=\"|url\()#[^\")]+", "", drawn))
    assert "&quot;quoted&quot;" in drawn
    many = figures.epochs_panel({f"layer {i}": [(0, i)] for i in range(30)}, "rate")
    assert "layer 0<" in many and "layer 29<" in many and "layer 7<" not in many  # the first and the last


# In a real browser

PROBE = """
<script>
function parse(c) { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; }
function behind(e) {
  let layers = [];
  for (; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
  let color = [255, 255, 255];
  for (const [r, g, b, a] of layers.reverse()) color = [r, g, b].map((v, i) => v * a + color[i] * (1 - a));
  return color;
}
function light(c) {
  const [r, g, b] = c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
}
function faint(e) {
  const style = getComputedStyle(e), color = parse(e.closest('svg') ? style.fill : style.color);
  if (color[3] === 0 || !e.getClientRects().length) return false;
  const [a, b] = [light(color.slice(0, 3)), light(behind(e))].sort();
  return (b + .05) / (a + .05) < 4.5;
}
const texts = [...document.body.querySelectorAll('*')].filter(e =>
  e.tagName !== 'SCRIPT' && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
const wide = [...document.body.querySelectorAll('*')].filter(e =>
  !e.closest('.scroll, .strip, nav ul, pre, .skip') && e.getBoundingClientRect().right > innerWidth + 1);
const stops = [...document.querySelectorAll('a, summary, [tabindex="0"]')];
const boxes = [...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1
  && /auto|scroll/.test(getComputedStyle(e).overflowX));
const probe = Object.assign(parent.document.createElement('pre'), {id: 'probe', textContent: JSON.stringify({
  inner: innerWidth, page: document.documentElement.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 80)),
  faint: texts.filter(faint).map(e => e.outerHTML.slice(0, 120)), texts: texts.length,
  light: light(behind(document.body)), unloaded: [...document.images].filter(i => !i.naturalWidth).length,
  images: document.images.length, first: stops[0].className,
  unreachable: boxes.filter(e => !e.matches('[tabindex="0"]') && !e.querySelector('a')).map(e => e.className),
})});
parent.document.body.append(probe);
</script>
"""


def browse(text, folder, width, *options):
    """What the browser finds in the page, in a frame of that width, and what it says on its console."""
    if BROWSER is None:
        pytest.skip("no Chromium on PATH: the page is not looked at in a browser")
    file = folder / "page.html"
    inner = escape(text.replace("</body>", PROBE + "</body>"))  # in a frame: no window is as narrow as a phone
    file.write_text(f'<!doctype html><body><iframe srcdoc="{inner}" width="{width}" height="900" style="border: 0">')
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(unescape(found[1])), said


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)], ids=["phone, dark", "desktop, light"])
def test_a_browser_shows_all_of_it(pair, width, dark, tmp_path):
    found, said = browse(pair, tmp_path, width, *([DARK] if dark else []))
    assert not said
    assert found["inner"] == width and found["page"] <= width and not found["wide"]
    assert (found["light"] < 0.1) == dark and not found["faint"] and found["texts"] > 100
    assert found["images"] > 10 and not found["unloaded"]
    assert found["first"] == "skip" and not found["unreachable"]


def test_the_browser_would_tell(pair, tmp_path):
    wrong = '<div style="width: 2000px; color: #888; background: #999">faint</div><img src="data:image/png;base64,x">'
    wrong += '<div class="mute" style="overflow-x: auto; width: 9px">unreachable</div><script>nothing()</script>'
    found, said = browse(pair.replace("</body>", wrong + "</body>"), tmp_path, 390)
    assert "nothing is not defined" in said[0]
    assert found["page"] >= 2000 and len(found["wide"]) == 1 and len(found["faint"]) == 1 and found["unloaded"] == 1
    assert found["unreachable"] == ["mute"] and found["light"] > 0.8
