"""Folders as tests push and pull them."""

FILES = {
    "README.md": b"---\nlibrary_name: comcat_hf\n---\n# A model\n",
    "config.json": b'{"a": 1}\n',
    "model.safetensors": bytes(range(256)) * 40,
    "unet/ranks.json": b"{}\n",
}


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def push(client, folder, repo="user/repo", **options):
    return client(f"from comcat_hf.hub import push_folder\npush_folder({str(folder)!r}, {repo!r}, **{options!r})")


def pull(client, tmp_path, repo="user/repo", folder="pulled", **options):
    target = tmp_path / folder
    options = {"cache_dir": str(tmp_path / "cache")} | options
    client(f"comcat_hf.hub.pull_folder({repo!r}, {str(target)!r}, **{options!r}).as_posix()")
    return target
