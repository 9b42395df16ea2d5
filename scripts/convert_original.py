"""Turn files of the original release into ours: `comcat convert`, for those who run scripts.

    python scripts/convert_original.py vit small_79.58_0.44 small
    python scripts/convert_original.py adapter comcat_weight.pt adapter --base runwayml/stable-diffusion-v1-5

`--help` lists the arguments.
"""

from comcat_hf.cli.convert import convert


if __name__ == "__main__":
    convert(prog_name="convert_original.py")
