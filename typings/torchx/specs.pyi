class macros:
    replica_id: str
    rank0_env: str

class Resource:
    def __init__(self, cpu: int, gpu: int, memMB: int) -> None: ...

class Role:
    def __init__(
        self,
        *,
        name: str,
        image: str,
        entrypoint: str,
        args: list[str],
        env: dict[str, str],
        num_replicas: int,
        resource: Resource,
    ) -> None: ...

class AppDef:
    def __init__(self, *, name: str, roles: list[Role]) -> None: ...
