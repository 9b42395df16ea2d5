"""Model cards: what the Hub reads in them, and that a person's words survive."""

import pytest
import yaml
from huggingface_hub import ModelCard

from comcat_hf.errors import CheckpointError
from comcat_hf.reporting.cards import CardFacts, Measured, code_span, markdown_table, quoted, shown_base, write_card


FACTS = CardFacts(
    title="small",
    summary="`user/dense` compressed.",
    base="user/dense",
    relation="finetune",
    library="transformers",
    task="image-classification",
    snippet='import comcat_hf\nfrom transformers import pipeline\n\npipeline("image-classification", "user/small")',
    tags=("model-compression",),
    dataset="user/images",
    measured=(Measured("accuracy", "Top-1", 0.8125),),
    table=(("model", "top-1"), ("dense", "82.00%"), ("compressed", "81.25%")),
    pictures=(("Ranks", "ranks.png"),),
    details="Reduction: 50%",
)


def metadata(path):
    return yaml.safe_load(path.read_text().split("---\n")[1])


def test_the_hub_reads_what_was_measured(tmp_path):
    path = write_card(tmp_path, FACTS)
    card = ModelCard(path.read_text(), ignore_metadata_errors=False)
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.8125, "user/images")
    found = metadata(path)
    assert found["base_model"] == "user/dense" and found["base_model_relation"] == "finetune"
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "image-classification"
    assert found["tags"] == ["image-classification", "comcat", "model-compression"]
    assert found["datasets"] == ["user/images"]
    assert "```python\nimport comcat_hf\n" in card.text and "| compressed | 81.25% |" in card.text
    assert "![Ranks](ranks.png)" in card.text and "Reduction: 50%" in card.text


def test_what_a_person_wrote_survives(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# My words\n\nKeep them.\n")
    path = write_card(tmp_path, FACTS)
    once = path.read_text()
    assert "# My words\n\nKeep them." in once and once.index("My words") < once.index("# small")
    assert metadata(path)["license"] == "mit" and metadata(path)["tags"][0] == "mine"
    path.write_text(once + "\nA word at the end.\n")
    again = write_card(tmp_path, FACTS.__class__(**(vars(FACTS) | {"summary": "Another."}))).read_text()
    assert again.count("# small") == 1 and "Another." in again and "compressed." not in again
    assert "Keep them." in again and "A word at the end." in again
    assert metadata(path)["tags"].count("comcat") == 1 and len(metadata(path)["model-index"]) == 1


def test_a_folder_of_this_machine_does_not_become_a_base(tmp_path):
    facts = CardFacts(**(vars(FACTS) | {"base": str(tmp_path), "dataset": None}))
    path = write_card(tmp_path, facts)
    assert "base_model" not in metadata(path) and "model-index" not in metadata(path)
    assert shown_base(str(tmp_path)) == tmp_path.name and shown_base("user/dense") == "user/dense"


def test_images_of_this_machine_are_no_data_set_of_the_hub(tmp_path):
    text = write_card(tmp_path, CardFacts(**(vars(FACTS) | {"dataset": str(tmp_path)}))).read_text()
    assert str(tmp_path) not in text
    assert "datasets" not in metadata(tmp_path / "README.md") and "model-index" not in metadata(tmp_path / "README.md")


def test_of_a_folder_only_the_last_part_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for base in (".", f"{tmp_path}/", f"C:\\Users\\me\\{tmp_path.name}", f"~/models/{tmp_path.name}"):
        assert shown_base(base) == tmp_path.name


def test_a_gallery_for_pipelines(tmp_path):
    facts = CardFacts(**(vars(FACTS) | {"gallery": (("a photo of sks dog", "validation/0.png"),)}))
    path = write_card(tmp_path, facts)
    assert metadata(path)["widget"] == [{"text": "a photo of sks dog", "output": {"url": "validation/0.png"}}]
    assert "<Gallery />" in path.read_text()


BEGIN, END = "<!-- comcat_hf: begin -->", "<!-- comcat_hf: end -->"


@pytest.mark.parametrize(
    "mine",
    [
        f"{BEGIN}\nMine, behind a mark whose end I took away.",
        f"Mine.\n\n{BEGIN}\nold\n{END}\n\nMore.\n\n{BEGIN}\ncopied\n{END}\n\nThe last.",
        "Mine.\n\n---\n\nBelow a line.",
    ],
)
def test_marks_out_of_order_cost_no_word_of_a_person(tmp_path, mine):
    (tmp_path / "README.md").write_text(mine)
    for _ in range(3):
        text = write_card(tmp_path, FACTS).read_text()
    words = mine.replace("old", "").replace("copied", "").replace(BEGIN, "").replace(END, "").split("\n")
    assert all(word in text for word in words)
    assert text.count("# small") == 1 and text.count("`user/dense` compressed.") == 1


def test_marks_among_the_facts_do_not_end_our_part(tmp_path):
    facts = CardFacts(**(vars(FACTS) | {"title": f"a {END} b", "details": f"c {END} d {BEGIN}"}))
    once = write_card(tmp_path, facts).read_text()
    assert write_card(tmp_path, facts).read_text() == once
    text = once.partition("\n---\n")[2]
    assert (text.count(BEGIN), text.count(END)) == (1, 1)


def test_facts_of_any_text_stay_in_their_place(tmp_path):
    prompt = "a photo\n---\nof `sks` | <!-- dog: {x} # \u2028 'y' \"z\""
    changes = {
        "title": prompt,
        "gallery": ((prompt, "v.png"),),
        "extra": {"instance_prompt": prompt},
        "details": "a\n```\n# b\n````",
        "table": (("model", "top|1"), ("a\nb", "1")),
        "snippet": f"import comcat_hf\nprompt = {quoted(prompt)}",
    }
    path = write_card(tmp_path, CardFacts(**(vars(FACTS) | changes)))
    card = ModelCard(path.read_text(), ignore_metadata_errors=False)
    assert card.data.get("instance_prompt") == card.data.get("widget")[0]["text"] == prompt
    assert card.data.model_name == prompt
    assert "# a photo --- of `sks` | &lt;!-- dog" in card.text
    assert "`````\na\n```\n# b\n````\n`````\n" in card.text
    assert "| model | top\\|1 |" in card.text and "| a b | 1 |" in card.text
    code = card.text.split("```python\n")[1].split("\n```")[0]
    names = {}
    exec(compile(code, "card", "exec"), names)
    assert names["prompt"] == prompt


@pytest.mark.parametrize(("mark", "line"), [("", "\r\n"), ("\ufeff", "\n"), ("\ufeff", "\r\n")])
def test_cards_of_other_editors(tmp_path, mark, line):
    path = tmp_path / "README.md"
    path.write_bytes(f"{mark}---\nlicense: mit\n---\n\nMy words.\n".replace("\n", line).encode())
    write_card(tmp_path, FACTS)
    content = path.read_bytes()
    assert content.startswith(b"---") and b"My words." in content and content.count(b"license: mit") == 1
    assert content.count(b"\n") == content.count(line.encode())
    assert metadata(path)["license"] == "mit" and metadata(path)["library_name"] == "transformers"


def test_a_damaged_card_is_left_as_it_was(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: [\n---\nMine.\n")
    with pytest.raises(CheckpointError, match=r"README.md: expected a model card with YAML metadata"):
        write_card(tmp_path, FACTS)
    assert path.read_text() == "---\nlicense: [\n---\nMine.\n"


@pytest.mark.parametrize(
    ("name", "span"),
    [("user/dense", "`user/dense`"), ("my `best` vit", "`` my `best` vit ``"), ("a``\n# b", "``` a`` # b ```")],
)
def test_a_name_stays_in_its_code_span(name, span):
    assert code_span(name) == span


def test_tables():
    assert markdown_table([("a", "<!-- b")]).startswith("| a | &lt;!-- b |\n")
    assert markdown_table(()) == ""
    assert markdown_table([("a", "b"), ("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"
