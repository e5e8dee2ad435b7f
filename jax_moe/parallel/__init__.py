"""Expert parallelism over a mesh: tokens travel between ranks, and none is dropped.

api         apply_expert_parallel: checks, inside of `jax.shard_map`
sharded     expert_parallel: the same as a function of global arrays
layer       what a rank does: route at home, dispatch, the local layer, combine
pieces      the same piece by piece, the exchange of one beside the matmuls of another
exchange    the exchanges by name (collectives, two_level, nvlink) and the choice among them
placement   which rank holds which expert, copies of busy ones
workspace   how much memory that takes
ranks       the devices of a mesh axis; tokens: what travels
"""

from jax_moe.parallel.api import apply_expert_parallel as apply_expert_parallel
from jax_moe.parallel.api import apply_routed_expert_parallel as apply_routed_expert_parallel
from jax_moe.parallel.sharded import describe_exchange as describe_exchange
from jax_moe.parallel.sharded import expert_parallel as expert_parallel
from jax_moe.parallel.sharded import partition_specs as partition_specs
from jax_moe.parallel.workspace import workspace_bytes as workspace_bytes
