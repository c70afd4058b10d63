"""Data: from files of records to mapped token caches.

    files      which file holds a split, and its rows
    formats    a row as a checked record
    templates  a conversation as text
    tokenizer  text as ids, and back
    encode     a record as ids and the flags that say what is trained on
    cache      many of those in one mapped file
    prepare    all of it in a child process (`child`, `worker`), which takes its memory with it

Importing any of these loads neither a tokenizer library nor a template engine.
"""
