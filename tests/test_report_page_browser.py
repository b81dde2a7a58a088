"""The page in a real browser, driven through its own controls, its console empty throughout."""

import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support import expected_conditions
from selenium.webdriver.support.ui import Select, WebDriverWait
from synthetic_reports import HOSTILE, synthetic_report

HOOKS = [f"blocks.{i}.hook_resid_post" for i in range(3)]
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking"


@pytest.fixture(scope="module")
def report():
    return synthetic_report(
        HOOKS, factors=(4, 8), n_shown=30, n_words=300, certainties=("counted", "bounded", "alive")
    )


@pytest.fixture(scope="module")
def address(report, tmp_path_factory):
    return report.save_page(tmp_path_factory.mktemp("page")).as_uri()


@pytest.fixture(scope="module")
def chromium():
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture
def page(chromium, address):
    """The page as it opens; whatever a test does there may leave nothing in the console."""
    open_page(chromium, address)
    yield chromium
    assert chromium.get_log("browser") == []


def open_page(chromium, address, *, width=1280, scheme="light"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    # From elsewhere, since another fragment alone would not load anything.
    chromium.get("about:blank")
    chromium.get(address)


def find(page, selector):
    """The element, once the page has drawn it: a click on a busy machine takes its time."""
    drawn = expected_conditions.presence_of_element_located((By.CSS_SELECTOR, selector))
    return WebDriverWait(page, 20).until(drawn)


def find_all(page, selector):
    return page.find_elements(By.CSS_SELECTOR, selector)


def column(page, number):
    return [cell.text for cell in find_all(page, f"#feature-table tbody tr > :nth-child({number})")]


def shows(page, title):
    """Waits for the feature of that title."""
    shown = expected_conditions.text_to_be_present_in_element((By.ID, "feature-title"), title)
    WebDriverWait(page, 20).until(shown)


def latents(report, hook=HOOKS[0], factor=4):
    return report.views[f"{hook}/x{factor}-seed0"].latents.tolist()


def test_the_first_view_answers_the_question_in_words_tables_and_charts(page):
    assert "2.50 (2.40 to 2.70) features per neuron" in find(page, "#summary").text
    assert [chart.text for chart in find_all(page, "#layer-charts figcaption")] == [
        "Features per neuron, with their interval",
        "2 × load, against its bound",
        "L0: latents on for a token",
        "FVU: share of variance left over",
        "Loss recovered",
        "Share of latents that never fired",
    ]
    assert len(find_all(page, "#density-charts figure")) == 3
    assert len(find_all(page, "#width-charts figure")) == 3
    assert len(find_all(page, "#dictionaries tbody tr")) == 6
    assert len(find_all(page, "#feature-table tbody tr")) == 30


def test_a_click_on_a_column_sorts_by_it_and_a_second_one_the_other_way(page, report):
    numbers = sorted(latents(report))
    densities = [float(text) for text in column(page, 2)]
    assert densities == sorted(densities, reverse=True)
    for direction, expected in (("ascending", numbers), ("descending", numbers[::-1])):
        find(page, "th[data-column=latent] button").click()
        assert [int(text) for text in column(page, 1)] == expected
        header = find(page, "th[data-column=latent]")
        assert header.get_attribute("aria-sort") == direction
    assert len(find_all(page, "#feature-table th[aria-sort]")) == 1


def test_the_filter_leaves_what_matches_and_says_how_many(page, report):
    wanted = latents(report)[5]
    find(page, "#filter").send_keys(str(wanted))
    assert column(page, 1) == [str(wanted)]
    assert find(page, "#matches").text == "1 of 30 features"
    find(page, "#filter").send_keys(Keys.CONTROL, "a", Keys.DELETE)
    assert find(page, "#matches").text == "30 of 30 features"
    find(page, "#filter").send_keys("ONERROR")
    assert str(latents(report)[0]) in column(page, 1)
    assert len(column(page, 1)) < 30


def test_a_feature_opens_with_all_that_is_known_of_it_and_takes_the_focus(page, report):
    first = latents(report)[0]
    find(page, "#feature-table tbody a").click()
    shows(page, f"Feature {first}")
    assert page.switch_to.active_element.get_attribute("id") == "feature-title"
    assert page.current_url.endswith(f"#{HOOKS[0]}/x4/seed0/feature{first}")
    assert find(page, "#feature dl").text.split("\n")[1] == "0.1 (10,000 tokens)"
    assert "Histogram of activations" in find(page, "#feature svg").get_attribute("aria-label")
    assert len(find_all(page, "#feature .contexts li")) == 5
    promoted, neighbours = find_all(page, "#feature .pairs")
    assert len(promoted.find_elements(By.TAG_NAME, "li")) == 8
    assert len(neighbours.find_elements(By.TAG_NAME, "li")) == 5


def test_tokens_are_shaded_by_activation_and_hostile_ones_are_only_text(page):
    find(page, "#feature-table tbody a").click()
    peak = find(page, "#feature .contexts mark")
    assert peak.get_property("textContent") == HOSTILE[0]
    assert peak.get_attribute("title") == "activation 9"
    grounds = {
        token.get_attribute("title"): token.value_of_css_property("background-color")
        for token in find_all(page, "#feature .contexts .on")
    }
    assert len(set(grounds.values())) > 10
    texts = {mark.get_property("textContent") for mark in find_all(page, "#feature mark")}
    assert HOSTILE[1] in texts
    assert not find_all(page, "img, b")
    assert len(find_all(page, "script")) == 4
    assert page.title == "Features of model </title><script>alert(2)</script>"


def test_links_lead_on_and_the_address_brings_a_feature_back(page, report):
    numbers = latents(report)
    find(page, "#feature-table tbody a").click()
    find(page, "#feature a[rel=next]").click()
    shows(page, f"Feature {numbers[1]}")
    page.back()
    shows(page, f"Feature {numbers[0]}")
    page.forward()
    page.refresh()
    shows(page, f"Feature {numbers[1]}")
    link = find(page, "#link").get_attribute("href")
    open_page(page, link)
    shows(page, f"Feature {numbers[1]}")


def test_links_of_the_table_of_dictionaries_and_the_menu_choose_a_dictionary(page, report):
    find_all(page, "#dictionaries tbody a")[3].click()
    chosen = Select(find(page, "#dictionary"))
    assert chosen.first_selected_option.text == f"{HOOKS[1]}, topk x8, seed 0"
    assert set(column(page, 1)) == set(map(str, latents(report, HOOKS[1], 8)))
    chosen.select_by_index(5)
    assert set(column(page, 1)) == set(map(str, latents(report, HOOKS[2], 8)))
    assert f"Features of {HOOKS[2]}, topk x8" in find(page, "#feature-caption").text
    assert page.current_url.endswith(f"#{HOOKS[2]}/x8/seed0")
    # There and back again, the link to the same feature opens it still.
    find(page, "#feature-table tbody a").click()
    chosen.select_by_index(4)
    assert not find(page, "#feature").is_displayed()
    chosen.select_by_index(5)
    find(page, "#feature-table tbody a").click()
    shows(page, f"Feature {latents(report, HOOKS[2], 8)[0]}")


def test_neighbours_that_are_shown_are_links(page, report, tmp_path):
    views = report.views[f"{HOOKS[0]}/x4-seed0"]
    neighbours = views.neighbours.clone()
    neighbours[0] = torch.tensor([1, 2, int(views.latents[7]), 3, 4])
    assert not set(views.latents.tolist()) & {1, 2, 3, 4}
    changed = {**report.views, f"{HOOKS[0]}/x4-seed0": replace(views, neighbours=neighbours)}
    open_page(page, replace(report, views=changed).save_page(tmp_path).as_uri())
    find(page, "#feature-table tbody a").click()
    (link,) = find_all(page, "#feature section:last-child a")
    link.click()
    shows(page, f"Feature {views.latents[7]}")


def test_an_address_of_nothing_says_so(page, address):
    for fragment in ("nothing/x4/seed0/feature1", f"{HOOKS[0]}/x4/seed0/feature999999", "%E0%A4"):
        open_page(page, f"{address}#{fragment}")
        assert find(page, "#unknown").text == f"This page shows no {fragment}."
    open_page(page, f"{address}#widths")
    assert find(page, "#unknown").text == ""


def test_everything_can_be_done_with_the_keyboard(page, report):
    page.execute_script("document.getElementById('filter').focus()")
    reached = []
    for _ in range(9):
        page.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.switch_to.active_element.text)
    assert reached[1:7] == ["Feature", "Density", "Mean", "Highest", "Peaks at", "Promotes"]
    assert reached[7] == str(latents(report)[0])
    page.switch_to.active_element.send_keys(Keys.ENTER)
    shows(page, f"Feature {latents(report)[1]}")
    page.execute_script("document.querySelector('th[data-column=mean] button').focus()")
    page.switch_to.active_element.send_keys(Keys.SPACE)
    assert find(page, "th[data-column=mean]").get_attribute("aria-sort") == "descending"


def test_a_screen_reader_finds_names_for_everything(page):
    find(page, "#feature-table tbody a").click()
    for chart in find_all(page, "figure > svg"):
        assert chart.get_attribute("role") == "img"
        assert len(chart.get_attribute("aria-label")) > 20
    assert all(caption.text for caption in find_all(page, "table caption"))
    assert len(find_all(page, "table caption")) == len(find_all(page, "table"))
    for control in find_all(page, "select, input, button, a, [role=region]"):
        if control.is_displayed():
            assert control.accessible_name.strip()
    levels = [int(heading.tag_name[1]) for heading in find_all(page, "h1, h2, h3, h4")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_light_and_dark(page, address, scheme):
    open_page(page, address, scheme=scheme)
    find(page, "#feature-table tbody a").click()
    ground = luminance(find(page, "body").value_of_css_property("background-color"))
    assert (ground > 0.5) == (scheme == "light")
    for selector in ("body", "a", ".note", "caption", ".value", "button"):
        text = luminance(find(page, selector).value_of_css_property("color"))
        low, high = sorted([text, ground])
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector


def luminance(colour):
    """Relative luminance of a CSS colour, as WCAG 2 has it."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_phone_shows_it_without_scrolling_sideways(page, address):
    open_page(page, address, width=390)
    find(page, "#feature-table tbody a").click()
    assert page.execute_script("return document.documentElement.scrollWidth") == 390


def test_the_page_asks_the_network_for_nothing(page):
    find(page, "#feature-table tbody a").click()
    asked = "return performance.getEntriesByType('resource').map(one => one.name)"
    assert page.execute_script(asked) == []


def test_activations_without_tokens_say_that_they_have_none(chromium, tmp_path):
    report = synthetic_report(HOOKS[:1], n_shown=3, n_words=20)
    for name, views in report.views.items():
        report.views[name] = replace(
            views,
            tokens=views.tokens[:0, :, :0],
            activations=views.activations[:0, :, :0],
            promoted=views.promoted[:, :0],
            logits=views.logits[:, :0],
        )
    open_page(chromium, report.save_page(tmp_path).as_uri())
    assert [one.text for one in find_all(chromium, "#feature-table th button")][-1] == "Highest"
    find(chromium, "#feature-table tbody a").click()
    assert "came without tokens" in find(chromium, "#feature").text
    assert "no model was given" in find(chromium, "#feature").text
    assert chromium.get_log("browser") == []
