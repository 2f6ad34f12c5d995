"""The report as one HTML file, drawn from ``report.json``."""

from ptq.checkpoint.target import PAGE
from ptq.report.page.page import render, report_page

__all__ = ["PAGE", "render", "report_page"]
