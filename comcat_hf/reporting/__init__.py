"""Reports: one HTML file with tables and pictures inside, which opens without a network."""

from .page import Section as Section
from .page import write_report as write_report
