"""Compression of image classifiers at full scale: settings, data, stages and the loop."""

from .settings import CompressSettings as CompressSettings
