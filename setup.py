"""Build metadata: every value is read from `settings.ini`, so that it is written once."""
from configparser import ConfigParser
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
LICENCES = {"apache2": "Apache-2.0"}  # nbdev's name -> SPDX expression

ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lib = cfg["lib_path"]
readme = ROOT / "README.md"

setuptools.setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=LICENCES[cfg["license"]],
    license_files=["LICENSE"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    packages=setuptools.find_packages(include=[lib, f"{lib}.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={
        "dev": cfg["dev_requirements"].split(),  # to read, run and test the notebooks
        "docs": cfg["docs_requirements"].split(),  # to build the site
        "browser": cfg["browser_requirements"].split(),  # to test the pages in a browser
        "paper": cfg["paper_requirements"].split(),  # pandoc, for the sections of the paper
        "lm": cfg["lm_requirements"].split(),  # tokenizers, and how near their tokens are
        "track": cfg["track_requirements"].split(),  # programs that follow runs
        "bench": cfg["bench_requirements"].split(),  # the other framework that the speed page compares with
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{lib} = {lib}._modidx:d"],  # other nbdev projects may link to our symbols
        "papermill.engine": [f"{lib} = {lib}.tools.papermill_plugin:StrictEngine"],  # page 80
    },
)
