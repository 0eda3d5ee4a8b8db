"""Networks as files of other runtimes, each run there and compared with PyTorch before it is written."""

from slimclr_hub.hub.export.checks import Calibration as Calibration
from slimclr_hub.hub.export.checks import Exported as Exported
from slimclr_hub.hub.export.executorch import export_executorch as export_executorch
from slimclr_hub.hub.export.litert import export_litert as export_litert
from slimclr_hub.hub.export.network import FORMATS as FORMATS
from slimclr_hub.hub.export.network import check_format as check_format
from slimclr_hub.hub.export.network import export_network as export_network
from slimclr_hub.hub.export.onnx import export_onnx as export_onnx
from slimclr_hub.hub.export.onnx import export_shared_onnx as export_shared_onnx
from slimclr_hub.hub.export.openvino import export_openvino as export_openvino
from slimclr_hub.hub.export.pt2 import export_pt2 as export_pt2
