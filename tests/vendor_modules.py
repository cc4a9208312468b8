"""Run in a process with stand-in CANN libraries: what torchair makes of the vendor's own modules, and their numbers.

``python -m tests.vendor_modules OUT`` writes a dictionary: scheme -> eager result, state dict round trips, and for each
chip the operators and the interpreted result.
"""

import os
import sys

import torch

from quantpass.lowering.standin_device import install_for


def main(path):
    install_for("ascend910b")
    import torch_npu.contrib.module as vendor

    import quantpass as qp
    from quantpass.lowering.standin_process import TorchairProcess
    from tests.schemes import K, N, all_schemes

    qp.emulate_npu()
    found = {}
    with TorchairProcess() as process, torch.no_grad():
        for scheme in all_schemes():
            theirs, ours = scheme.filled(vendor), scheme.filled(qp.nn)
            record = found[scheme.name] = {"eager": theirs(scheme.x), "ours": ours(scheme.x), "chips": {}}
            for key, source, package in (("to ours", theirs, qp.nn), ("to theirs", ours, vendor)):
                empty = getattr(package, scheme.module)(K, N, **scheme.settings)
                if package is vendor:  # whose variables take only what has their shape, also with assign=True
                    for name, tensor in scheme.tensors.items():
                        getattr(empty, name).data = torch.empty_like(tensor)
                empty.load_state_dict(source.state_dict(), assign=True)
                record[key] = empty(scheme.x)
            for chip in scheme.chips:
                preview = qp.preview_ge(theirs, (scheme.x,), target=chip, fuse=False, process=process)
                ((result,),) = preview.run()
                record["chips"][chip] = {"ops": preview.ops, "result": result}
    torch.save(found, path)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
