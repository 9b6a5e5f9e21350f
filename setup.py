"""Reads the metadata from settings.ini, so that each fact stands in one place."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(here / "settings.ini", encoding="utf-8")
meta = settings["DEFAULT"]
extras = {}
for line in meta["extras"].strip().splitlines():
    name, _, needs = line.partition(":")
    extras[name.strip()] = [need.strip() for need in needs.split(";") if need.strip()]

setup(
    name=meta["lib_name"],
    version=meta["version"],
    description=meta["description"],
    long_description=(here / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author=meta["author"],
    license=meta["license"],
    keywords=meta["keywords"],
    python_requires=f">={meta['min_python']}",
    packages=find_packages(include=["supertrainer", "supertrainer.*"]),
    package_data={"supertrainer": ["configs/**/*.yaml", "**/*.j2", "chat/templates/*.jinja", "chat/templates/*.yaml", "**/*.css"]},
    install_requires=meta["requirements"].strip().splitlines(),
    extras_require=extras,
    entry_points={"console_scripts": meta["console_scripts"].strip().splitlines()},
    classifiers=["Programming Language :: Python :: 3", "Intended Audience :: Developers",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    zip_safe=False,
)
