"""Where the bytes of a store lie and how they get there whole: paths, atomic commits, run locks, schemas.

`layout` says where everything lies, `commit` writes and reads runs (a run is a folder of parts with one manifest),
`run_lock` lets one driver at a time work on a run. Below them, `filesystem` holds the few file operations that differ
between a local folder and object storage, and `object_storage` those of S3.

Data files lie outside a store. `addresses` says which addresses they may have, `remote_protocols` finds the requests
for one (`remote_s3`, `remote_gs`, `remote_http`, each behind `remote_objects.Objects`), and `range_file` makes a file
of them.
"""
