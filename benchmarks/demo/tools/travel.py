# SPDX-License-Identifier: Apache-2.0
"""Tools of the travel planner: a few cities, and arithmetic instead of the internet."""

import math
import zlib
from typing import Any, NamedTuple

from benchmarks.demo.tools.tool import Tool, choice, flag, whole


class Place(NamedTuple):
    """A city with its position, its yearly temperatures and its price of a hotel night."""

    latitude: float
    longitude: float
    mean_celsius: float
    swing_celsius: float
    night_eur: int
    currency: str


CITIES = {
    "Lisbon": Place(38.72, -9.14, 17.5, 6.0, 118, "EUR"),
    "Kyoto": Place(35.01, 135.77, 16.2, 12.0, 134, "JPY"),
    "Vienna": Place(48.21, 16.37, 11.4, 10.5, 126, "EUR"),
    "Oslo": Place(59.91, 10.75, 6.9, 11.0, 161, "NOK"),
    "Marrakesh": Place(31.63, -7.99, 20.4, 9.0, 84, "MAD"),
}
SIGHTS = {
    "Lisbon": ["Belem Tower", "Alfama", "LX Factory", "Tile Museum", "Sao Jorge Castle"],
    "Kyoto": ["Fushimi Inari", "Nishiki Market", "Kinkaku-ji", "Gion", "Arashiyama"],
    "Vienna": ["Belvedere", "Naschmarkt", "Schoenbrunn", "Prater", "Hofburg"],
    "Oslo": ["Opera House", "Vigeland Park", "Fram Museum", "Aker Brygge", "Munch Museum"],
    "Marrakesh": ["Medina", "Majorelle Garden", "Bahia Palace", "Koutoubia", "Menara"],
}
CUISINES = ["local", "seafood", "vegetarian", "street food"]
FOCUS = ["culture", "food", "nature", "mixed"]
HOTEL_EXTRA = {"room": 0.0, "breakfast": 14.0, "half board": 38.0}
EARTH_KM = 6371.0


def get_weather(city: str, month: int, days: int) -> dict[str, Any]:
    """A forecast from the yearly cycle of the city and a fixed pseudo-random ripple."""
    place = CITIES[city]
    season = math.cos((month - 7) / 12 * 2 * math.pi)
    rows: list[dict[str, Any]] = []
    for day in range(1, days + 1):
        ripple = _ripple(city, month, day)
        high = place.mean_celsius + place.swing_celsius * season + 6 * (ripple - 0.5)
        rain = round(100 * _ripple("rain", city, month, day))
        sky = "rain" if rain > 70 else "clouds" if rain > 40 else "sun"
        rows.append({"day": day, "high_c": round(high, 1), "rain_percent": rain, "sky": sky})
    best = min(rows, key=lambda row: row["rain_percent"])
    return {"city": city, "month": month, "forecast": rows, "best_day": best["day"]}


def search_flights(
    origin: str, destination: str, month: int, max_stops: int, cabin: str
) -> dict[str, Any]:
    """Flights priced by great-circle distance, stops and cabin; the cheapest comes first."""
    distance_km = _distance_km(CITIES[origin], CITIES[destination])
    first_number = 100 + zlib.crc32(destination.encode()) % 800
    flights: list[dict[str, Any]] = []
    for number in range(4):
        stops = number % (max_stops + 1)
        hours = distance_km / 830 + 0.6 + 1.7 * stops
        price = (60 + 0.085 * distance_km) * (1 - 0.12 * stops) * (1.9 if cabin != "economy" else 1)
        price *= 0.9 + 0.3 * _ripple(origin, destination, month, number)
        departure = 6 + 4 * number
        flights.append(
            {
                "flight": f"{origin[:2].upper()}{first_number + number}",
                "departs": f"{departure:02d}:{number * 15:02d}",
                "hours": round(hours, 1),
                "stops": stops,
                "price_eur": round(price, 2),
            }
        )
    flights.sort(key=lambda flight: flight["price_eur"])
    return {
        "from": origin,
        "to": destination,
        "distance_km": round(distance_km),
        "flights": flights,
    }


def book_hotel(city: str, nights: int, guests: int, board: str, refundable: bool) -> dict[str, Any]:
    """A booking with its price broken down night by night."""
    place = CITIES[city]
    rooms = math.ceil(guests / 2)
    bill: list[dict[str, Any]] = []
    for night in range(1, nights + 1):
        weekend = 1.2 if night % 7 in (5, 6) else 1.0
        room = rooms * place.night_eur * weekend * (1.1 if refundable else 1.0)
        meals = guests * HOTEL_EXTRA[board]
        bill.append({"night": night, "room_eur": round(room, 2), "meals_eur": round(meals, 2)})
    net = sum(row["room_eur"] + row["meals_eur"] for row in bill)
    tax = round(2.5 * guests * nights, 2)
    code = zlib.crc32(f"{city}{nights}{guests}{board}{refundable}".encode())
    return {
        "confirmation": f"H{code % 10**6:06d}",
        "city": city,
        "rooms": rooms,
        "bill": bill,
        "city_tax_eur": tax,
        "total_eur": round(net + tax, 2),
        "free_cancellation": refundable,
    }


def search_restaurants(city: str, cuisine: str, max_price_eur: int) -> dict[str, Any]:
    """Restaurants near the sights of the city that keep to the price."""
    found: list[dict[str, Any]] = []
    for sight in SIGHTS[city]:
        price = 12 + round(38 * _ripple("price", city, cuisine, sight))
        rating = round(3.6 + 1.3 * _ripple("rating", city, cuisine, sight), 1)
        walk = 2 + round(14 * _ripple("walk", city, cuisine, sight))
        name = f"{sight.split()[0]} {cuisine.title()} Kitchen"
        row = {"name": name, "near": sight, "price_eur": price, "rating": rating, "walk_min": walk}
        if price <= max_price_eur:
            found.append(row)
    found.sort(key=lambda row: (-row["rating"], row["price_eur"]))
    return {"city": city, "cuisine": cuisine, "found": len(found), "restaurants": found}


def create_itinerary(city: str, days: int, focus: str, start_hour: int) -> dict[str, Any]:
    """A day plan that takes two sights a day in a fixed order, with a walk between them."""
    sights = SIGHTS[city]
    plan: list[dict[str, Any]] = []
    for day in range(days):
        first, second = sights[2 * day % len(sights)], sights[(2 * day + 1) % len(sights)]
        hours = 2 + round(2 * _ripple(focus, city, day))
        plan.append(
            {
                "day": day + 1,
                "morning": f"{start_hour:02d}:00 {first}, {hours} h",
                "afternoon": f"{start_hour + hours + 2:02d}:00 {second}, {hours} h",
                "walking_km": round(3 + 6 * _ripple("walk", city, day), 1),
            }
        )
    total = round(sum(row["walking_km"] for row in plan), 1)
    return {"city": city, "focus": focus, "plan": plan, "total_walking_km": total}


def _ripple(*parts: object) -> float:
    """A fixed number in [0, 1) for these parts: looks random, is the same everywhere."""
    return zlib.crc32("|".join(map(str, parts)).encode()) / 2**32


def _distance_km(a: Place, b: Place) -> float:
    """Great-circle distance (haversine)."""
    lat_a, lat_b = math.radians(a.latitude), math.radians(b.latitude)
    d_lat, d_lon = lat_b - lat_a, math.radians(b.longitude - a.longitude)
    chord = math.sin(d_lat / 2) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin(d_lon / 2) ** 2
    return 2 * EARTH_KM * math.asin(math.sqrt(chord))


CITY = choice(CITIES, "The city, exactly as it is written in the list of supported cities.")
MONTH = whole(1, 12, "Month of travel as a number: 1 is January, 12 is December.")

TRAVEL_TOOLS = (
    Tool(
        get_weather,
        "Daily forecast for a city: highest temperature in Celsius, chance of rain in percent and "
        "state of the sky. Use it before proposing outdoor plans or a month of travel. The best "
        "day in the answer is the one with the least rain.",
        {"city": CITY, "month": MONTH, "days": whole(5, 7, "How many days to forecast, 5 to 7.")},
    ),
    Tool(
        search_flights,
        "Search one-way flights between two supported cities and return up to four offers with "
        "departure, duration, stops and price in euros, cheapest first. Prices are per person. "
        "Search the way back with a second call.",
        {
            "origin": choice(CITIES, "City of departure."),
            "destination": choice(CITIES, "City of arrival; must differ from the origin."),
            "month": MONTH,
            "max_stops": whole(0, 2, "Largest number of stops: 0 asks for direct flights only."),
            "cabin": choice(["economy", "premium"], "Cabin; premium costs nearly twice as much."),
        },
    ),
    Tool(
        book_hotel,
        "Book a mid-range hotel and return the confirmation number with the bill, one line a "
        "night. Rooms hold two guests. A refundable booking costs ten percent more and may be "
        "cancelled free of charge. Book only after the traveller has agreed to the dates.",
        {
            "city": CITY,
            "nights": whole(3, 7, "Number of nights, 3 to 7."),
            "guests": whole(1, 4, "Number of guests, children included."),
            "board": choice(HOTEL_EXTRA, "Meals included in the price."),
            "refundable": flag("Whether the booking can be cancelled free of charge."),
        },
    ),
    Tool(
        search_restaurants,
        "Find restaurants within walking distance of the main sights, best rating first, with the "
        "usual price of a meal for one person in euros. Places above the price limit are left out, "
        "so raise the limit when nothing is found.",
        {
            "city": CITY,
            "cuisine": choice(CUISINES, "Kind of kitchen the traveller asked for."),
            "max_price_eur": whole(20, 60, "Highest price of a meal for one person, in euros."),
        },
    ),
    Tool(
        create_itinerary,
        "Write the day plan: a morning and an afternoon stop for each day, with starting times, "
        "visiting hours and the distance to walk. Call it last, when weather, flights and hotel "
        "are known, and once for each city of the trip.",
        {
            "city": CITY,
            "days": whole(3, 7, "Number of full days in the city."),
            "focus": choice(FOCUS, "What the traveller cares about most."),
            "start_hour": whole(8, 11, "Hour of the first visit of the day, 8 to 11."),
        },
    ),
)
