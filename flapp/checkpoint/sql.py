"""The tables of a chunk store, every statement on them, and the sizes of pages and chunks that suit them."""

SCHEMA = (
    "CREATE TABLE chunk_data(id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, codec INTEGER NOT NULL, data BLOB)",
    "CREATE TABLE chunk_metadata(round INTEGER, chunk_id INTEGER, hash BLOB NOT NULL, parts TEXT, size INTEGER,"
    " PRIMARY KEY(round, chunk_id)) WITHOUT ROWID",
    "CREATE TABLE rounds(round INTEGER PRIMARY KEY, saved INTEGER, created_at TEXT, metrics TEXT, config_digest TEXT,"
    " input_digest TEXT, model_digest TEXT, facts_digest TEXT)",
    "CREATE TABLE store_meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID",
)
# Exactly what the statements above leave in sqlite_schema, whose order means nothing.
SCHEMA_ROWS: set[tuple[str, str, str | None]] = {("table", sql.split()[2].partition("(")[0], sql) for sql in SCHEMA}
SCHEMA_ROWS |= {("index", "sqlite_autoindex_chunk_data_1", None)}
FIND_SCHEMA = "SELECT type, name, sql FROM sqlite_schema"
META = "SELECT key, value FROM store_meta"
INSERT_META = "INSERT INTO store_meta VALUES (?, ?)"
FIND_HASH = "SELECT 1 FROM chunk_data WHERE hash = ?"
LAST_ID = "SELECT coalesce(max(id), 0) FROM chunk_data"
INSERT_DATA = "INSERT INTO chunk_data VALUES (?, ?, 0, zeroblob(?))"
INSERT_METADATA = "INSERT INTO chunk_metadata VALUES (?, ?, ?, ?, ?)"
NEXT_SAVED = "SELECT coalesce(max(saved), 0) + 1 FROM rounds"
INSERT_ROUND = "INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
RECORDS = "SELECT * FROM rounds ORDER BY round"
CHECK_SAVED = "SELECT count(*) FROM chunk_metadata m JOIN chunk_data d ON d.hash = m.hash WHERE m.round = ?"
SIZE_OF_ROUND = "SELECT count(*), coalesce(sum(size), 0) FROM chunk_metadata WHERE round = ?"
FIND_ROUND = "SELECT 1 FROM rounds WHERE round = ?"
COUNT_METADATA = "SELECT count(*) FROM chunk_metadata"
COUNT_DATA = "SELECT count(*), coalesce(sum(length(data)), 0) FROM chunk_data"
NEWEST_FIRST = "SELECT round FROM rounds ORDER BY saved DESC"
DELETE_METADATA = "DELETE FROM chunk_metadata WHERE round = ?"
DELETE_ROUND = "DELETE FROM rounds WHERE round = ?"
ORPHANS = "SELECT id FROM chunk_data WHERE hash NOT IN (SELECT hash FROM chunk_metadata)"
DELETE_ORPHANS = f"DELETE FROM chunk_data WHERE id IN ({ORPHANS})"
STRAY_ROUNDS = "SELECT DISTINCT round FROM chunk_metadata WHERE round NOT IN (SELECT round FROM rounds)"
CHUNKS = """SELECT m.chunk_id, m.hash, m.parts, m.size, d.id, d.codec, length(d.data), typeof(d.data)
    FROM chunk_metadata m LEFT JOIN chunk_data d ON d.hash = m.hash WHERE m.round = ? ORDER BY m.chunk_id"""


def page_size_for(expected_bytes: int) -> int:
    """Return SQLite's page size for a model of so many bytes: large pages are fast, small ones waste nothing."""
    limits = ((64 << 20, 65536), (16 << 20, 32768), (1 << 20, 16384), (16 << 10, 4096), (4 << 10, 1024))
    return next((size for limit, size in limits if expected_bytes > limit), 512)


def chunk_bytes_for(page_size: int) -> int:
    """Return the chunk size nearest above 1 MiB whose row fills its overflow pages k(U - 4) + M to the last byte.

    U is the page size, M what stays in the leaf (https://sqlite.org/fileformat2.html, "B-tree Cell Format").
    """
    leaf = (page_size - 12) * 32 // 255 - 23 - 64
    return (-(-((1 << 20) - leaf) // (page_size - 4)) * (page_size - 4) + leaf) // 16 * 16
