"""What an installed package holds: all that a clone has, so that the network in it works from anywhere."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
USE = """
import timm, torch, slimclr_hub
from slimclr_hub.data.sources import read_embedded
images, labels = read_embedded('test')
model = timm.create_model('slimclr_resnet20', pretrained=True, in_chans=1).eval()
inputs = (torch.from_numpy(images[:200]).float()[:, None] / 255 - 0.286) / 0.353
for width in model.widths:
    with torch.inference_mode():
        found = model.forward_at(inputs, width).argmax(1)
    print(slimclr_hub.__file__, (found.numpy() == labels[:200]).mean())
"""


def test_wheel_is_whole(tmp_path):
    """Every file of the package is in its wheel, and the network in it classifies, away from the clone."""
    files = [path for path in (ROOT / 'slimclr_hub').rglob('*') if path.is_file() and path.parent.name != '__pycache__']
    listed = [path.relative_to(ROOT).as_posix() for path in files]
    for name in (*listed, 'pyproject.toml', 'README.md', 'LICENSE'):
        (tmp_path / 'clone' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'clone' / name).write_bytes((ROOT / name).read_bytes())
    build = f'from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})'
    subprocess.run([sys.executable, '-c', build], cwd=tmp_path / 'clone', check=True, capture_output=True)
    (wheel,) = tmp_path.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
        assert set(listed) <= set(archive.namelist())
        archive.extractall(tmp_path / 'installed')
    environment = {'PYTHONPATH': str(tmp_path / 'installed'), 'PATH': '', 'HF_HUB_OFFLINE': '1', 'HOME': str(tmp_path)}
    said = subprocess.check_output([sys.executable, '-c', USE], cwd=tmp_path, env=environment, text=True)
    lines = [line.split() for line in said.splitlines()]
    assert len(lines) == 4
    for origin, accuracy in lines:
        assert origin == str(tmp_path / 'installed' / 'slimclr_hub' / '__init__.py')
        assert float(accuracy) > 0.75  # by chance 0.1
