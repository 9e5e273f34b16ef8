"""HTTP beside gRPC: REST protocols over the methods of the gRPC server, probes, metrics and a page to look at.

A request becomes the same `Call` as over gRPC, with the same tokens, limits, batcher and errors. It differs in its
encoding only: `endpoint` has the table's form, `kserve`, `tfserving` and `native` are the rows.
"""
