"""
Tables (CSV, TSV, Parquet, what datasets saved) and their conversion to records.

In: a file or a folder that nobody has checked. Out: a file of records that passes `dropforge check`, and what was lost.
`reading` gives columns and rows as text, `conversion` chooses the columns and writes the records. Open `reading` first.
"""
