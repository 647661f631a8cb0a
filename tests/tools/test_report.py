"""The page of a run: what it shows, and what it says is missing."""

import base64
import io
import json
import re
import shutil
import subprocess

import pytest
from helpers import ROOT, TINY
from PIL import Image

import eval_knn
import main_pretrain
from tools import report
from tools.compare import Compared, Figures
from utils.errors import UserError

PICTURE = re.compile(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]*)"')
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def trained(run_main_once, imagenet, tmp_path_factory):
    """The run folder of a ViT that was trained for an epoch and judged, and one with a baseline."""
    output = tmp_path_factory.mktemp("runs")
    common = ("--cfg", ROOT / "configs/synco_vit_tiny.yaml", "--data-path", imagenet)
    opts = ("--opts", *TINY, "MODEL.NAME", "m", "PRINT_FREQ", "1", "TRAIN.EPOCHS", "1")
    run_main_once(main_pretrain, *common, "--output", output, *opts)
    for flags in ((), ("--tag", "raw_pixels", "--baseline", "raw_pixels")):
        run_main_once(eval_knn, *common, "--output", output, "--nb-knn", "5", *flags, *opts)
    return output / "m" / "default"


def pictures(page):
    """The pictures of a page, by their captions."""
    found = {}
    for code, caption in PICTURE.findall(page):
        image = Image.open(io.BytesIO(base64.b64decode(code)))
        image.load()
        found.setdefault(caption, []).append(image)
    return found


def make(run_main, folder, out, *flags):
    run_main(report, folder, "--out", out, *flags)
    return out.read_text()


def test_the_page_has_every_picture_in_itself(run_main, trained, tmp_path):
    beside = trained.parent / "raw_pixels"
    page = make(run_main, trained, tmp_path / "page.html", "--beside", beside, "--since", "0")
    shown = pictures(page)
    assert sum(map(len, shown.values())) == page.count("<img") == 8
    assert {len(shown[caption]) for caption in ("Before training.", "After training.")} == {2}
    assert "Attention of the class token." in shown
    for images in shown.values():
        for image in images:  # a picture of one colour would show nothing
            assert len(image.convert("RGB").resize((64, 64)).getcolors(4096)) > 16
    assert "Left out" not in page
    # the figures come first, and settings at the end, folded
    places = [page.index(text) for text in ("<td>results</td>", "<img", "<details>", "MODEL.TYPE")]
    assert places == sorted(places)
    assert any("Dashed: chance, 50.0%." in caption for caption in shown)
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # no network, no other file
    assert "seconds from the first command" in page
    knn = json.loads((trained / "knn_imagenet/results.json").read_text())["knn"]["5"]["top1"]
    assert f"<td>{knn:.6g}</td>" in page
    assert "<td>MODEL.ENCODER</td><td>vit_nano</td>" in page


def test_an_encoder_without_a_class_token_shows_similarity(run_main, imagenet, tmp_path):
    common = ("--cfg", ROOT / "configs/synco_vit_tiny.yaml", "--data-path", imagenet)
    opts = (*TINY, "MODEL.NAME", "m", "MODEL.ENCODER", "timm/test_resnet", "PRINT_FREQ", "1")
    run_main(main_pretrain, *common, "--output", tmp_path, "--opts", *opts, "TRAIN.EPOCHS", "1")
    page = make(run_main, tmp_path / "m/default", tmp_path / "page.html")
    assert "Where the feature of the image comes from." in pictures(page)
    assert "Left out: no k-NN figures" in page
    assert "Left out: no evaluation has written results.json" in page
    (course,) = (caption for caption in pictures(page) if caption.startswith("Figures of the run"))
    assert "Thick" not in course  # so few updates are not smoothed


def test_without_images_the_page_says_so(run_main, trained, tmp_path):
    folder = tmp_path / "m" / "copy"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("*.lock"))
    page = make(run_main, folder, tmp_path / "page.html", "--data-path", tmp_path / "nowhere")
    assert page.count("Left out: ") == 3 and "nowhere: the data path does not exist" in page
    assert len(pictures(page)) == 2  # the accuracy and the course


def test_what_is_no_run_is_refused(run_main, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json there"):
        run_main(report, tmp_path)


def test_names_are_text_not_markup(run_main, trained, tmp_path):
    page = make(run_main, trained, tmp_path / "page.html", "--title", "<b>a & b</b>")
    assert "<h1>&lt;b&gt;a &amp; b&lt;/b&gt;</h1>" in page


@pytest.mark.slow
def test_a_browser_shows_every_picture(run_main, trained, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    page = make(run_main, trained, tmp_path / "page.html")
    # the script runs in the browser, after its pictures were decoded
    script = """<script>onload = () => document.title = [...document.images].map(
        i => i.complete && i.naturalWidth > 50 && i.getBoundingClientRect().width > 50)</script>"""
    (tmp_path / "page.html").write_text(page.replace("</body>", script + "</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    address = (tmp_path / "page.html").as_uri()
    made = subprocess.run([browser, *flags, address], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>([^<]*)</title>", made.stdout).group(1)
    assert title == ",".join(["true"] * page.count("<img")), made.stderr[-2000:]


def test_the_accuracy_is_of_the_runs_own_data_set():
    def evaluated(**top1):
        run = Compared({})
        run.results = {n: Figures({"knn.20.top1": v}, {}, {}, None) for n, v in top1.items()}
        return report.knn_figures(run, "imagenet")

    assert evaluated(knn_cifar10=91.0, knn_imagenet=60.0) == {20: 60.0}
    assert evaluated(**{"knn_imagenet_subset_0.1": 9.0, "knn_imagenet_raw_pixels": 8.0}) == {
        20: 8.0
    }
    assert evaluated(knn_cifar10=91.0) == {}
