# SPDX-License-Identifier: Apache-2.0
"""Tools of the data analyst: a shop's orders in an SQLite database held in memory."""

import csv
import hashlib
import io
import json
import random
import sqlite3
import statistics
from functools import cache
from typing import Any

from benchmarks.demo.tools.tool import Tool, choice, flag, whole

REGIONS = ["north", "south", "east", "west"]
PRODUCTS = {"lamp": 39.0, "chair": 89.0, "desk": 249.0, "shelf": 129.0, "rug": 74.0}
CHANNELS = ["web", "store", "phone"]
NUM_ORDERS = 720
COLUMNS = ["region", "product", "channel", "month"]
METRICS = {"revenue": "units * price", "units": "units", "discount": "discount"}
AGGREGATES = {"sum": "SUM", "mean": "AVG", "max": "MAX"}
PIPELINES = ["clean", "monthly_rollup", "returns_report"]


@cache
def database() -> sqlite3.Connection:
    """The orders, the same at every start."""
    dice = random.Random(20260525)
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    connection.execute(
        "CREATE TABLE orders (id INTEGER, region TEXT, product TEXT, channel TEXT, month INTEGER,"
        " units INTEGER, price REAL, discount REAL, returned INTEGER)"
    )
    for number in range(1, NUM_ORDERS + 1):
        product = dice.choice(list(PRODUCTS))
        discount = dice.choice([0.0, 0.0, 0.05, 0.1])
        price = round(PRODUCTS[product] * (1 - discount), 2)
        place = (dice.choice(REGIONS), product, dice.choice(CHANNELS), dice.randint(1, 12))
        row = (number, *place, dice.randint(1, 9), price, discount, int(dice.random() < 0.08))
        connection.execute("INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    return connection


def query_db(metric: str, aggregate: str, group_by: str, descending: bool) -> dict[str, Any]:
    """One grouped query; the statement is returned with the rows."""
    sql = (
        f"SELECT {group_by}, COUNT(*), ROUND({AGGREGATES[aggregate]}({METRICS[metric]}), 2) AS v"
        f" FROM orders GROUP BY {group_by} ORDER BY v {'DESC' if descending else 'ASC'}"
    )
    rows = database().execute(sql).fetchall()
    keys = (group_by, "orders", f"{aggregate}_{metric}")
    return {"sql": sql, "rows": [dict(zip(keys, row, strict=True)) for row in rows]}


def create_chart(kind: str, metric: str, by: str, width: int) -> dict[str, Any]:
    """A chart drawn in text: one bar a group, the longest as wide as asked for."""
    groups = _grouped(metric, by)
    totals = {key: sum(values) for key, values in groups.items()}
    top = max(totals.values())
    marks = {"bar": "#", "line": "-", "dot": "."}[kind]
    lines = [
        f"{key!s:>8} {marks * round(width * total / top)} {total:.0f}"
        for key, total in totals.items()
    ]
    return {"kind": kind, "metric": metric, "by": by, "chart": "\n".join(lines)}


def export_data(file_format: str, region: str, limit: int) -> dict[str, Any]:
    """The newest orders of a region as a file, with its size and digest."""
    cursor = database().execute(
        "SELECT id, product, channel, month, units, price FROM orders WHERE region = ?"
        " ORDER BY id DESC LIMIT ?",
        (region, limit),
    )
    names = [column[0] for column in cursor.description]
    rows = cursor.fetchall()
    if file_format == "json":
        text = json.dumps([dict(zip(names, row, strict=True)) for row in rows])
    else:
        buffer = io.StringIO()
        delimiter = "," if file_format == "csv" else "\t"
        csv.writer(buffer, delimiter=delimiter, lineterminator="\n").writerows([names, *rows])
        text = buffer.getvalue()
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"format": file_format, "rows": len(rows), "sha256": digest, "content": text}


def run_pipeline(name: str, first_month: int, last_month: int) -> dict[str, Any]:
    """Rows in and out of every stage, and what the last stage made."""
    low, high = min(first_month, last_month), max(first_month, last_month)
    rows = database().execute(
        "SELECT month, units * price, returned FROM orders WHERE month BETWEEN ? AND ?", (low, high)
    )
    orders = rows.fetchall()
    kept = [row for row in orders if name == "returns_report" or not row[2]]
    stages = [
        {"stage": "extract", "rows_in": NUM_ORDERS, "rows_out": len(orders)},
        {"stage": "filter", "rows_in": len(orders), "rows_out": len(kept)},
    ]
    months = []
    for month in range(low, high + 1):
        revenue = [amount for at, amount, _ in kept if at == month]
        returned = sum(flag for at, _, flag in kept if at == month)
        months.append(
            {
                "month": month,
                "orders": len(revenue),
                "revenue": round(sum(revenue), 2),
                "returned": returned,
            }
        )
    stages.append({"stage": "rollup", "rows_in": len(kept), "rows_out": len(months)})
    return {"pipeline": name, "stages": stages, "months": months}


def compute_stats(metric: str, group_by: str, decimals: int) -> dict[str, Any]:
    """Mean, median, spread and quartiles of a metric in each group."""
    rows = []
    for key, values in _grouped(metric, group_by).items():
        quartiles = statistics.quantiles(values, n=4)
        rows.append(
            {
                group_by: key,
                "n": len(values),
                "mean": round(statistics.fmean(values), decimals),
                "median": round(statistics.median(values), decimals),
                "stdev": round(statistics.stdev(values), decimals),
                "q1": round(quartiles[0], decimals),
                "q3": round(quartiles[2], decimals),
            }
        )
    return {"metric": metric, "groups": rows}


def _grouped(metric: str, column: str) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    sql = f"SELECT {column}, {METRICS[metric]} FROM orders ORDER BY {column}, id"
    for key, value in database().execute(sql):
        groups.setdefault(key, []).append(value)
    return groups


METRIC = choice(METRICS, "What to measure; revenue is units times price after the discount.")
MONTH_FROM = whole(3, 6, "First month of the period, 3 to 6.")
MONTH_TO = whole(7, 9, "Last month of the period, 7 to 9.")

DATA_TOOLS = (
    Tool(
        query_db,
        "Aggregate the orders table by one column and return one row for each group: the number "
        "of orders and the aggregated metric, rounded to two digits. The SQL statement is part of "
        "the answer so that it can be quoted in the report.",
        {
            "metric": METRIC,
            "aggregate": choice(AGGREGATES, "How the values of a group become one number."),
            "group_by": choice(COLUMNS, "Column that makes the groups."),
            "descending": flag("Largest value first."),
        },
    ),
    Tool(
        create_chart,
        "Draw a chart of a metric as text, one line for each group, scaled so that the largest "
        "group has the given width. Draw a chart only for a comparison that the report makes, and "
        "say in one sentence what it shows.",
        {
            "kind": choice(
                ["bar", "line", "dot"], "Bars compare groups, lines and dots show time."
            ),
            "metric": METRIC,
            "by": choice(COLUMNS, "Column that makes the groups."),
            "width": whole(20, 50, "Width of the longest bar in characters."),
        },
    ),
    Tool(
        export_data,
        "Export the newest orders of one region as a file and return its content, the number of "
        "rows and the first half of its SHA-256 digest. Exports hold no personal data. Keep them "
        "small: the reader wants a sample, not the table.",
        {
            "file_format": choice(["csv", "tsv", "json"], "Format of the file."),
            "region": choice(REGIONS, "Sales region to export."),
            "limit": whole(10, 16, "Largest number of rows, newest first."),
        },
    ),
    Tool(
        run_pipeline,
        "Run a prepared pipeline over a period and return the rows that went in and out of every "
        "stage together with the monthly result. Use clean before statistics, monthly_rollup for "
        "trends and returns_report for questions about returned goods.",
        {
            "name": choice(PIPELINES, "Which pipeline to run."),
            "first_month": MONTH_FROM,
            "last_month": MONTH_TO,
        },
    ),
    Tool(
        compute_stats,
        "Describe the distribution of a metric in each group: count, mean, median, standard "
        "deviation and the two quartiles. Prefer the median where a few large orders pull the "
        "mean away from it.",
        {
            "metric": METRIC,
            "group_by": choice(COLUMNS, "Column that makes the groups."),
            "decimals": whole(0, 3, "Digits after the decimal point."),
        },
    ),
)
