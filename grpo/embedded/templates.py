"""The situations, names and things of the word problems. Data only; `problems.py` fills the slots.

In a step, `[a * b = c]` is a calculation whose result `c` later steps may use; the last result is the answer.
`{fruit}` and `{other_fruit}` are two different things of one kind (THINGS), `{He} {he} {his} {him}` are `{name}`'s.
"""

from dataclasses import dataclass, field

Range = tuple[int, int]


@dataclass(frozen=True)
class Template:
    """One situation. `numbers` grow with the level; `few` do not (days of a week, people in a car)."""

    phrasings: tuple[str, ...]
    steps: tuple[str, ...]
    numbers: dict[str, Range]
    few: dict[str, Range] = field(default_factory=dict)


BOYS = ("Tom", "Ben", "Sam", "Leo", "Max", "Omar", "Jack", "Adam", "Noah", "Ravi", "Hugo", "Liam")
GIRLS = ("Anna", "Mia", "Lucy", "Emma", "Nina", "Sara", "Zoe", "Ella", "Rosa", "Maya", "Julia", "Clara")

THINGS = {
    "fruit": ("apples", "oranges", "pears", "plums", "peaches", "lemons"),
    "toy": ("marbles", "stickers", "beads", "shells", "stamps", "cards"),
    "pen": ("pencils", "pens", "notebooks", "erasers", "markers", "rulers"),
    "snack": ("cookies", "muffins", "candies", "cupcakes", "brownies", "pretzels"),
    "animal": ("cows", "goats", "horses", "ducks", "chickens", "rabbits"),
    "flower": ("roses", "tulips", "lilies", "daisies"),
    "drink": ("juice", "milk", "tea", "lemonade"),
    "color": ("red", "blue", "green", "yellow", "white", "black"),
    "sport": ("soccer", "tennis", "hockey", "basketball"),
}

TEMPLATES = (
    # Buying and paying
    Template(
        (
            "{name} buys {count} {pen} that cost ${price} each. {He} pays with ${paid}. How much change does {he} get?",
            "At the store, {pen} cost ${price} each. {name} takes {count} of them and gives the clerk ${paid}. "
            "How many dollars does {he} get back?",
        ),
        (
            "The {pen} cost [count * price = cost] dollars.",
            "{name} gets back [paid - cost = change] dollars.",
        ),
        {"count": (2, 9), "price": (2, 9), "paid": (10, 90)},
    ),
    Template(
        (
            "{name} buys {a} {fruit} at ${p} each and {b} {other_fruit} at ${q} each. How much does {he} pay in total?",
            "One of the {fruit} costs ${p} and one of the {other_fruit} costs ${q}. "
            "How many dollars do {a} {fruit} "
            "and {b} {other_fruit} cost together?",
        ),
        (
            "The {fruit} cost [a * p = first] dollars.",
            "The {other_fruit} cost [b * q = second] dollars.",
            "Together that is [first + second = total] dollars.",
        ),
        {"a": (2, 9), "p": (2, 9), "b": (2, 9), "q": (2, 9)},
    ),
    Template(
        (
            "{name} has ${money}. {He} buys a hat for ${hat} and a scarf for ${scarf}. How much money is left?",
            "A hat costs ${hat} and a scarf costs ${scarf}. {name} buys both and had ${money} before. "
            "How many dollars does {he} have now?",
        ),
        (
            "The hat and the scarf cost [hat + scarf = cost] dollars.",
            "{name} has [money - cost = left] dollars left.",
        ),
        {"money": (40, 99), "hat": (5, 30), "scarf": (5, 30)},
    ),
    Template(
        (
            "A shirt costs ${shirt}. Shoes cost {times} times as much. "
            "How much do the shirt and the shoes cost together?",
            "{name} buys a shirt for ${shirt} and shoes for {times} times that price. How much does {he} spend?",
        ),
        (
            "The shoes cost [shirt * times = shoes] dollars.",
            "Together they cost [shirt + shoes = total] dollars.",
        ),
        {"shirt": (5, 25)},
        {"times": (2, 5)},
    ),
    Template(
        (
            "{name} buys {packs} packs of {pen} with {each} {pen} in each pack. "
            "{He} gives {given} {pen} to {friend}. "
            "How many {pen} does {name} keep?",
            "There are {each} {pen} in a pack. {name} gets {packs} packs and gives away {given} {pen}. "
            "How many {pen} are left?",
        ),
        (
            "{name} buys [packs * each = bought] {pen}.",
            "{He} keeps [bought - given = left] {pen}.",
        ),
        {"packs": (2, 9), "each": (3, 12), "given": (2, 20)},
    ),
    Template(
        (
            "{name} wants a bike that costs ${bike}. {He} has ${saved} and saves ${week} each week. "
            "In how many weeks can {he} buy the bike?",
            "A bike costs ${bike}. {name} already has ${saved}. If {he} saves ${week} every week, "
            "how many weeks does {he} need?",
        ),
        (
            "{name} still needs [bike - saved = missing] dollars.",
            "That takes [missing / week = weeks] weeks.",
        ),
        {"bike": (40, 120), "saved": (5, 60), "week": (3, 9)},
    ),
    Template(
        (
            "{name} and {friend} buy a gift for ${gift} and a cake for ${cake}. They share the cost equally. "
            "How much does each of them pay?",
            "A gift costs ${gift} and a cake costs ${cake}. {name} and {friend} each pay half. "
            "How much does {name} pay?",
        ),
        (
            "The gift and the cake cost [gift + cake = cost] dollars.",
            "Each of them pays [cost / 2 = share] dollars.",
        ),
        {"gift": (10, 50), "cake": (6, 30)},
    ),
    Template(
        (
            "A ticket costs ${adult} for adults and ${child} for children. "
            "How much do {adults} adults and {children} "
            "children pay?",
            "{adults} adults and {children} children go to the zoo. "
            "Adults pay ${adult} each and children pay ${child} "
            "each. How much do they pay in total?",
        ),
        (
            "The adults pay [adults * adult = first] dollars.",
            "The children pay [children * child = second] dollars.",
            "In total they pay [first + second = total] dollars.",
        ),
        {"adult": (5, 12), "child": (2, 8)},
        {"adults": (2, 6), "children": (2, 9)},
    ),
    Template(
        (
            "{name} had ${money}. {He} bought {a} {snack} for ${p} each and {b} {other_snack} for ${q} each. "
            "How much money does {he} have left?",
            "{a} {snack} cost ${p} each and {b} {other_snack} cost ${q} each. "
            "{name} buys them all and had ${money}. "
            "How many dollars are left?",
        ),
        (
            "The {snack} cost [a * p = first] dollars.",
            "The {other_snack} cost [b * q = second] dollars.",
            "Together that is [first + second = cost] dollars.",
            "{name} has [money - cost = left] dollars left.",
        ),
        {"money": (50, 120), "a": (2, 8), "p": (2, 7), "b": (2, 8), "q": (2, 7)},
    ),
    Template(
        (
            "A coat costs ${coat}. In a sale it is ${off} cheaper. How much do {count} coats cost in the sale?",
            "{name} buys {count} coats in a sale. A coat was ${coat}, but now each is ${off} less. "
            "How much does {he} pay?",
        ),
        (
            "In the sale a coat costs [coat - off = price] dollars.",
            "{count} coats cost [price * count = total] dollars.",
        ),
        {"coat": (15, 40), "off": (3, 20)},
        {"count": (2, 6)},
    ),
    # Earning and saving
    Template(
        (
            "{name} earns ${pay} an hour. {He} works {hours} hours a day for {days} days. How much does {he} earn?",
            "For {days} days {name} works {hours} hours a day. {He} is paid ${pay} for each hour. "
            "How many dollars does {he} earn?",
        ),
        (
            "{name} works [hours * days = time] hours.",
            "{He} earns [time * pay = total] dollars.",
        ),
        {"pay": (3, 9)},
        {"hours": (2, 5), "days": (2, 5)},
    ),
    Template(
        (
            "{name} earns ${pay} a day and spends ${spent} a day on lunch. How much does {he} save in {days} days?",
            "Each day {name} earns ${pay} and pays ${spent} for lunch. How many dollars are left after {days} days?",
        ),
        (
            "Each day {he} saves [pay - spent = saved] dollars.",
            "In {days} days that is [saved * days = total] dollars.",
        ),
        {"pay": (12, 40), "spent": (3, 12)},
        {"days": (2, 7)},
    ),
    Template(
        (
            "{name} washes {cars} cars for ${p} each and mows {lawns} lawns for ${q} each. "
            "{He} spends ${spent}. "
            "How much does {he} have left?",
            "{name} gets ${p} for each car {he} washes and ${q} for each lawn {he} mows. "
            "After {cars} cars and {lawns} "
            "lawns, {he} spends ${spent}. How many dollars are left?",
        ),
        (
            "The cars bring [cars * p = first] dollars.",
            "The lawns bring [lawns * q = second] dollars.",
            "Together that is [first + second = total] dollars.",
            "After spending {name} has [total - spent = left] dollars.",
        ),
        {"cars": (2, 9), "p": (3, 8), "lawns": (2, 6), "q": (4, 9), "spent": (5, 40)},
    ),
    Template(
        (
            "{name} saves ${a} in May and twice as much in June. How much does {he} save in both months?",
            "In May {name} saved ${a}. In June {he} saved twice as much. How many dollars did {he} save in total?",
        ),
        (
            "In June {name} saves [a * 2 = june] dollars.",
            "In both months {he} saves [a + june = total] dollars.",
        ),
        {"a": (5, 50)},
    ),
    Template(
        (
            "{name} has ${a}. {friend} has ${more} more than {name}. "
            "They put their money together to buy a game for "
            "${game}. How much do they have left?",
            "{friend} has ${more} more than {name}, who has ${a}. Together they buy a game for ${game}. "
            "How much money is left?",
        ),
        (
            "{friend} has [a + more = other] dollars.",
            "Together they have [a + other = both] dollars.",
            "After the game they have [both - game = left] dollars.",
        ),
        {"a": (10, 40), "more": (3, 20), "game": (15, 60)},
    ),
    # Collections, given and found
    Template(
        (
            "{name} has {a} {toy}. {friend} has {times} times as many. How many {toy} do they have together?",
            "{friend} has {times} times as many {toy} as {name}. {name} has {a}. How many {toy} do both have in total?",
        ),
        (
            "{friend} has [a * times = other] {toy}.",
            "Together they have [a + other = total] {toy}.",
        ),
        {"a": (4, 20)},
        {"times": (2, 5)},
    ),
    Template(
        (
            "{name} has {a} {toy}. {He} finds {b} more and then loses {c}. How many {toy} does {he} have now?",
            "{name} had {a} {toy}, got {b} more from {friend}, and lost {c} of them. How many {toy} are left?",
        ),
        (
            "With the new ones {name} has [a + b = more] {toy}.",
            "After losing {c}, {he} has [more - c = left] {toy}.",
        ),
        {"a": (10, 60), "b": (5, 30), "c": (3, 30)},
    ),
    Template(
        (
            "{name} has {a} {toy}. {He} gives half of them to {friend} and then buys {b} more. "
            "How many {toy} does {he} "
            "have now?",
            "{name} gave half of {his} {a} {toy} to {friend}. Then {he} bought {b}. How many {toy} does {name} have?",
        ),
        (
            "After giving half, {name} has [a / 2 = half] {toy}.",
            "With the new ones {he} has [half + b = total] {toy}.",
        ),
        {"a": (8, 80), "b": (3, 30)},
    ),
    Template(
        (
            "{name} has {a} {color} {toy} and {b} {other_color} {toy}. {He} puts them in bags of {size}. "
            "How many bags does {he} fill?",
            "There are {a} {color} {toy} and {b} {other_color} {toy}. If {size} {toy} fit in a bag, "
            "how many bags does {name} need?",
        ),
        (
            "There are [a + b = total] {toy} in total.",
            "They fill [total / size = bags] bags.",
        ),
        {"a": (6, 40), "b": (6, 40), "size": (3, 9)},
    ),
    Template(
        (
            "{name} has {pages} pages of {toy} with {each} {toy} on each page. "
            "{friend} has {fewer} fewer {toy}. "
            "How many {toy} do they have together?",
            "Each of the {pages} pages in the book of {name} holds {each} {toy}. "
            "{friend} has {fewer} {toy} fewer. "
            "How many do both have?",
        ),
        (
            "{name} has [pages * each = first] {toy}.",
            "{friend} has [first - fewer = second] {toy}.",
            "Together they have [first + second = total] {toy}.",
        ),
        {"pages": (3, 9), "each": (4, 9), "fewer": (3, 20)},
    ),
    Template(
        (
            "{name} shares {a} {toy} equally among {friends} friends. Each friend already had {b}. "
            "How many {toy} does each friend have now?",
            "{friends} friends have {b} {toy} each. {name} shares {a} more equally among them. "
            "How many {toy} does each one have?",
        ),
        (
            "Each friend gets [a / friends = share] {toy}.",
            "Now each one has [share + b = total] {toy}.",
        ),
        {"a": (12, 72), "b": (3, 20)},
        {"friends": (3, 8)},
    ),
    Template(
        (
            "{name} finds {a} {toy} on Monday, {b} on Tuesday and {c} on Friday. {He} gives {d} away. "
            "How many {toy} are left?",
            "On Monday {name} finds {a} {toy}, on Tuesday {b} and on Friday {c}. {friend} gets {d} of them. "
            "How many {toy} does {name} keep?",
        ),
        (
            "On Monday and Tuesday {name} finds [a + b = two] {toy}.",
            "With Friday that is [two + c = three] {toy}.",
            "After giving some away {he} has [three - d = left] {toy}.",
        ),
        {"a": (5, 30), "b": (5, 30), "c": (5, 30), "d": (3, 40)},
    ),
    # Baking and eating
    Template(
        (
            "{name} bakes {trays} trays of {snack} with {each} on each tray. {He} eats {eaten}. "
            "How many {snack} are left?",
            "There are {trays} trays with {each} {snack} on each. {name} and {friend} eat {eaten} of them. "
            "How many {snack} remain?",
        ),
        (
            "There are [trays * each = baked] {snack}.",
            "After eating there are [baked - eaten = left] {snack}.",
        ),
        {"trays": (2, 9), "each": (5, 12), "eaten": (3, 20)},
    ),
    Template(
        (
            "{name} bakes {a} {snack}. {He} keeps {kept} and sells the rest for ${price} each. "
            "How much money does {he} make?",
            "Of {a} {snack}, {name} keeps {kept}. The rest are sold at ${price} each. How many dollars is that?",
        ),
        (
            "{name} sells [a - kept = sold] {snack}.",
            "That makes [sold * price = money] dollars.",
        ),
        {"a": (15, 40), "kept": (3, 20), "price": (2, 6)},
    ),
    Template(
        (
            "{name} makes {a} {snack} and {b} {other_snack}. {He} puts them on plates of {size}. "
            "{friend} takes {taken} "
            "plates. How many plates are left?",
            "There are {a} {snack} and {b} {other_snack}. A plate holds {size} of them. "
            "After {friend} takes {taken} full "
            "plates, how many full plates are left?",
        ),
        (
            "In total there are [a + b = total] pieces.",
            "They fill [total / size = plates] plates.",
            "After {friend} takes some, [plates - taken = left] plates are left.",
        ),
        {"a": (10, 50), "b": (10, 50), "size": (3, 6)},
        {"taken": (2, 6)},
    ),
    Template(
        (
            "A cake needs {eggs} eggs and a pie needs {other} eggs. {name} bakes {cakes} cakes and {pies} pies. "
            ""
            "How many eggs does {he} need?",
            "{name} bakes {cakes} cakes with {eggs} eggs each and {pies} pies with {other} eggs each. "
            "How many eggs does {he} use?",
        ),
        (
            "The cakes need [cakes * eggs = first] eggs.",
            "The pies need [pies * other = second] eggs.",
            "In total that is [first + second = total] eggs.",
        ),
        {"cakes": (2, 9), "pies": (2, 9)},
        {"eggs": (3, 6), "other": (2, 5)},
    ),
    Template(
        (
            "A pizza has {slices} slices. {name} orders {pizzas} pizzas for {people} people. "
            "How many slices does each person get?",
            "{people} people share {pizzas} pizzas equally. Each pizza has {slices} slices. "
            "How many slices are there for each person?",
        ),
        (
            "There are [pizzas * slices = total] slices.",
            "Each person gets [total / people = share] slices.",
        ),
        {"pizzas": (2, 9)},
        {"slices": (6, 12), "people": (3, 9)},
    ),
    Template(
        (
            "{name} drinks {a} cups of {drink} a day and {friend} drinks {b} cups a day. "
            "How many cups do they drink in "
            "{days} days?",
            "Each day {name} has {a} cups of {drink} and {friend} has {b}. How many cups is that in {days} days?",
        ),
        (
            "Each day they drink [a + b = day] cups.",
            "In {days} days they drink [day * days = total] cups.",
        ),
        {"a": (2, 6), "b": (2, 6)},
        {"days": (3, 9)},
    ),
    Template(
        (
            "{name} makes {jugs} jugs of {drink} with {cups} cups in each. "
            "{guests} guests drink {each} cups each. "
            "How many cups are left?",
            "There are {jugs} jugs of {drink}, and each holds {cups} cups. "
            "If {guests} guests have {each} cups each, "
            "how many cups remain?",
        ),
        (
            "The jugs hold [jugs * cups = total] cups.",
            "The guests drink [guests * each = drunk] cups.",
            "There are [total - drunk = left] cups left.",
        ),
        {"jugs": (4, 9), "cups": (5, 9), "guests": (3, 9)},
        {"each": (2, 4)},
    ),
    # Farm and garden
    Template(
        (
            "A farm has {a} {animal} and {times} times as many {other_animal}. How many animals are there in total?",
            "{name} keeps {a} {animal}. {He} has {times} times as many {other_animal}. "
            "How many animals does {he} have?",
        ),
        (
            "There are [a * times = other] {other_animal}.",
            "In total there are [a + other = total] animals.",
        ),
        {"a": (4, 25)},
        {"times": (2, 5)},
    ),
    Template(
        (
            "A farmer has {a} {animal}. {He} sells {b} of them and buys {c} {other_animal}. "
            "How many animals does the "
            "farmer have now?",
            "{name} had {a} {animal}. After selling {b} of them, {he} bought {c} {other_animal}. "
            "How many animals does {he} have now?",
        ),
        (
            "After selling, there are [a - b = left] {animal}.",
            "With the {other_animal} there are [left + c = total] animals.",
        ),
        {"a": (15, 60), "b": (3, 30), "c": (4, 30)},
    ),
    Template(
        (
            "{name} has {hens} hens. Each hen lays {eggs} eggs a week. "
            "{He} sells all the eggs in boxes of {size}. "
            "How many boxes does {he} sell in a week?",
            "Each of {hens} hens lays {eggs} eggs a week. {name} packs the eggs in boxes of {size}. "
            "How many boxes is that each week?",
        ),
        (
            "The hens lay [hens * eggs = total] eggs a week.",
            "That fills [total / size = boxes] boxes.",
        ),
        {"hens": (4, 12)},
        {"eggs": (3, 6), "size": (4, 6)},
    ),
    Template(
        (
            "{name} plants {rows} rows of {flower} with {each} in each row and {b} {other_flower}. "
            "How many flowers are there?",
            "In a garden there are {b} {other_flower} and {rows} rows of {each} {flower}. "
            "How many flowers are in the garden?",
        ),
        (
            "There are [rows * each = first] {flower}.",
            "With the {other_flower} there are [first + b = total] flowers.",
        ),
        {"rows": (2, 9), "each": (3, 9), "b": (5, 40)},
    ),
    Template(
        (
            "{name} picks {a} {fruit}. {friend} picks {fewer} fewer. They put them all in baskets of {size}. "
            "How many baskets do they fill?",
            "{friend} picks {fewer} fewer {fruit} than {name}, who picks {a}. A basket holds {size}. "
            "How many baskets do they fill together?",
        ),
        (
            "{friend} picks [a - fewer = other] {fruit}.",
            "Together they pick [a + other = total] {fruit}.",
            "That fills [total / size = baskets] baskets.",
        ),
        {"a": (12, 45), "fewer": (2, 20), "size": (3, 9)},
    ),
    Template(
        (
            "There are {trees} trees with {each} {fruit} on each tree. "
            "{name} picks {picked} of the {fruit} and then {rotten} "
            "more fall down. How many are still on the trees?",
            "Each of {trees} trees bears {each} {fruit}. After {name} picks {picked}, {rotten} fall down. "
            "How many {fruit} are still on the trees?",
        ),
        (
            "There are [trees * each = total] {fruit}.",
            "After picking there are [total - picked = some] {fruit}.",
            "After the fall there are [some - rotten = left] {fruit} on the trees.",
        ),
        {"trees": (3, 9), "each": (5, 12), "picked": (5, 30), "rotten": (3, 15)},
    ),
    Template(
        (
            "{name} sells {a} {flower} at ${p} each. The seeds cost ${seeds} and the water costs ${water}. "
            "How much money is left?",
            "Seeds cost ${seeds} and water costs ${water}. {name} grows {a} {flower} and sells them for ${p} "
            "each. "
            "How much does {he} gain?",
        ),
        (
            "{name} gets [a * p = money] dollars.",
            "The costs are [seeds + water = costs] dollars.",
            "So [money - costs = left] dollars are left.",
        ),
        {"a": (5, 20), "p": (2, 7), "seeds": (4, 20), "water": (3, 20)},
    ),
    Template(
        (
            "A horse eats {a} bags of hay a month and a cow eats {b}. "
            "How many bags do {horses} horses and {cows} cows eat in "
            "{months} months?",
            "Each month a horse eats {a} bags of hay and a cow eats {b}. "
            "{name} has {horses} horses and {cows} cows. "
            "How many bags do they eat in {months} months?",
        ),
        (
            "The horses eat [horses * a = first] bags a month.",
            "The cows eat [cows * b = second] bags a month.",
            "Together they eat [first + second = month] bags a month.",
            "In {months} months that is [month * months = total] bags.",
        ),
        {"horses": (2, 6), "cows": (2, 6)},
        {"a": (2, 5), "b": (2, 5), "months": (2, 4)},
    ),
    # Reading, school, sport
    Template(
        (
            "A book has {pages} pages. {name} reads {a} pages on Monday and {b} on Tuesday. How many pages are left?",
            "{name} reads {a} pages of a book on Monday and {b} pages on Tuesday. The book has {pages} pages. "
            "How many does {he} still have to read?",
        ),
        (
            "{name} has read [a + b = read] pages.",
            "There are [pages - read = left] pages left.",
        ),
        {"pages": (60, 150), "a": (8, 40), "b": (8, 40)},
    ),
    Template(
        (
            "{name} reads {a} pages a day for {days} days and then {b} pages on Sunday. How many pages does {he} read?",
            "For {days} days {name} reads {a} pages a day. On Sunday {he} reads {b}. How many pages is that in total?",
        ),
        (
            "In {days} days {name} reads [a * days = first] pages.",
            "With Sunday that is [first + b = total] pages.",
        ),
        {"a": (4, 15), "b": (5, 40)},
        {"days": (2, 6)},
    ),
    Template(
        (
            "A book has {pages} pages and {name} has read {done}. {He} wants to finish it in {days} days. "
            "How many pages must {he} read each day?",
            "{name} has read {done} of the {pages} pages of a book. "
            "How many pages a day must {he} read to finish in "
            "{days} days?",
        ),
        (
            "There are [pages - done = left] pages left.",
            "Each day {he} must read [left / days = each] pages.",
        ),
        {"pages": (50, 120), "done": (10, 60)},
        {"days": (3, 8)},
    ),
    Template(
        (
            "A school has {classes} classes with {girls} girls and {boys} boys in each. "
            "How many children are in the school?",
            "In each of {classes} classes there are {girls} girls and {boys} boys. How many children is that?",
        ),
        (
            "Each class has [girls + boys = each] children.",
            "The school has [each * classes = total] children.",
        ),
        {"girls": (5, 15), "boys": (5, 15)},
        {"classes": (2, 7)},
    ),
    Template(
        (
            "{children} children and {teachers} teachers go on a trip. A van has {seats} seats. "
            "How many vans do they need?",
            "A van has {seats} seats. How many vans do {children} children and {teachers} teachers fill?",
        ),
        (
            "In total [children + teachers = people] people go.",
            "They need [people / seats = vans] vans.",
        ),
        {"children": (14, 60)},
        {"teachers": (2, 8), "seats": (5, 9)},
    ),
    Template(
        (
            "A teacher has {boxes} boxes of {pen} with {each} in each. "
            "{He} shares them equally among {children} children. "
            "How many {pen} does each child get?",
            "{boxes} boxes hold {each} {pen} each. They are shared equally among {children} children. "
            "How many {pen} does each get?",
        ),
        (
            "There are [boxes * each = total] {pen}.",
            "Each child gets [total / children = share] {pen}.",
        ),
        {"boxes": (2, 9), "each": (6, 12)},
        {"children": (3, 9)},
    ),
    Template(
        (
            "{name} runs {a} miles on each of {days} days. {friend} runs {b} miles on each of {other_days} "
            "days. "
            "How many more miles does {name} run?",
            "{name} runs {a} miles a day for {days} days and {friend} runs {b} miles a day for {other_days} "
            "days. "
            "How many miles more is that for {name}?",
        ),
        (
            "{name} runs [a * days = first] miles.",
            "{friend} runs [b * other_days = second] miles.",
            "{name} runs [first - second = more] miles more.",
        ),
        {"a": (4, 12), "b": (2, 9)},
        {"days": (3, 7), "other_days": (2, 6)},
    ),
    Template(
        (
            "In a {sport} game {name} gets {a} points in the first half and {more} more points in the second "
            "half. "
            "How many points does {he} get in the game?",
            "{name} plays {sport}. {He} gets {a} points first and then {more} more than that. "
            "How many points is that in all?",
        ),
        (
            "In the second half {he} gets [a + more = second] points.",
            "In the game {he} gets [a + second = total] points.",
        ),
        {"a": (6, 45), "more": (2, 20)},
    ),
    Template(
        (
            "A {sport} team wins {wins} games and gets {win} points for each. "
            "It also gets {draw} points for each of {draws} "
            "other games. A fine takes {fine} points away. How many points does the team have?",
            "{name} has a {sport} team with {wins} wins at {win} points each and {draws} other games at {draw} "
            "points each. "
            "It loses {fine} points for a fine. How many points are left?",
        ),
        (
            "The wins bring [wins * win = first] points.",
            "The other games bring [draws * draw = second] points.",
            "Together that is [first + second = total] points.",
            "After the fine the team has [total - fine = left] points.",
        ),
        {"wins": (3, 12), "draws": (2, 9), "fine": (2, 15)},
        {"win": (3, 5), "draw": (2, 3)},
    ),
    Template(
        (
            "{name} practices {sport} for {a} minutes on each of {days} days and {b} minutes on Sunday. "
            "How many minutes is that in {weeks} weeks?",
            "Each week {name} plays {sport} {a} minutes a day on {days} days and {b} minutes on Sunday. "
            "How many minutes does {he} play in {weeks} weeks?",
        ),
        (
            "On the {days} days it is [a * days = first] minutes.",
            "With Sunday it is [first + b = week] minutes a week.",
            "In {weeks} weeks it is [week * weeks = total] minutes.",
        ),
        {"a": (5, 15), "b": (5, 30)},
        {"days": (2, 5), "weeks": (2, 4)},
    ),
    # Travel, work and the house
    Template(
        (
            "A bus has {a} people. At the first stop {b} get off and {c} get on. How many people are on the bus now?",
            "{a} people are on a bus. Then {b} people get off and {c} people get on. How many people are there now?",
        ),
        (
            "After {b} get off there are [a - b = some] people.",
            "After {c} get on there are [some + c = now] people.",
        ),
        {"a": (15, 60), "b": (3, 30), "c": (3, 30)},
    ),
    Template(
        (
            "A bus has {a} people. At the first stop {b} get off. "
            "At the next stop {c} get on and then {d} get off. "
            "How many people are on the bus now?",
            "{a} people are on a bus. First {b} get off, then {c} get on, and then {d} get off. "
            "How many people are on the bus at the end?",
        ),
        (
            "After the first stop there are [a - b = some] people.",
            "When {c} get on there are [some + c = more] people.",
            "When {d} get off there are [more - d = now] people.",
        ),
        {"a": (20, 60), "b": (3, 20), "c": (3, 30), "d": (3, 30)},
    ),
    Template(
        (
            "{name} drives {speed} miles an hour for {hours} hours and then {more} miles more. "
            "How many miles does {he} drive?",
            "For {hours} hours {name} drives at {speed} miles an hour. Then {he} drives {more} miles. "
            "How long is the trip in miles?",
        ),
        (
            "In {hours} hours {name} drives [speed * hours = first] miles.",
            "In total that is [first + more = total] miles.",
        ),
        {"speed": (10, 30), "more": (5, 40)},
        {"hours": (2, 5)},
    ),
    Template(
        (
            "A trip is {trip} miles. {name} walks {speed} miles each hour for {hours} hours. How many miles are left?",
            "{name} walks {hours} hours at {speed} miles an hour. The whole trip is {trip} miles. "
            "How many miles are left to go?",
        ),
        (
            "{name} has walked [speed * hours = done] miles.",
            "There are [trip - done = left] miles left.",
        ),
        {"trip": (20, 80), "speed": (2, 6)},
        {"hours": (2, 9)},
    ),
    Template(
        (
            "A box weighs {box} pounds. {name} puts {count} books of {each} pounds each in it and takes out "
            "{out} pounds. "
            "How many pounds does the full box weigh now?",
            "{name} fills a box of {box} pounds with {count} books that weigh {each} pounds each. "
            "Then {he} removes {out} "
            "pounds. How heavy is the box now?",
        ),
        (
            "The books weigh [count * each = books] pounds.",
            "The full box weighs [box + books = full] pounds.",
            "Now it weighs [full - out = now] pounds.",
        ),
        {"box": (3, 12), "count": (3, 9), "out": (2, 20)},
        {"each": (2, 5)},
    ),
    Template(
        (
            "A house has {rooms} rooms with {windows} windows each. {name} has washed {done}. "
            "{He} washes {rate} windows an "
            "hour. How many hours does {he} need for the rest?",
            "{name} washes {rate} windows an hour. There are {rooms} rooms with {windows} windows each, and "
            "{done} are done. "
            "How many hours are left?",
        ),
        (
            "There are [rooms * windows = total] windows.",
            "There are [total - done = left] windows left.",
            "That takes [left / rate = hours] hours.",
        ),
        {"rooms": (4, 12), "windows": (3, 6), "done": (2, 20)},
        {"rate": (3, 6)},
    ),
    Template(
        (
            "A shop has {shelves} shelves with {each} {toy} on each. "
            "It sells {a} {toy} on Monday and {b} on Tuesday. "
            "How many {toy} are left?",
            "There are {shelves} shelves with {each} {toy} each. On Monday {a} are sold and on Tuesday {b}. "
            "How many {toy} does the shop still have?",
        ),
        (
            "The shop has [shelves * each = total] {toy}.",
            "It sells [a + b = sold] {toy}.",
            "There are [total - sold = left] {toy} left.",
        ),
        {"shelves": (4, 9), "each": (6, 12), "a": (3, 20), "b": (3, 20)},
    ),
    Template(
        (
            "{name} is {age} years old. {friend} is {older} years older. How old will {friend} be in {years} years?",
            "{friend} is {older} years older than {name}, who is {age}. What age will {friend} have in {years} years?",
        ),
        (
            "{friend} is [age + older = now] years old.",
            "In {years} years {friend} will be [now + years = then] years old.",
        ),
        {"age": (5, 40), "older": (2, 20)},
        {"years": (2, 12)},
    ),
    Template(
        (
            "{name} is {age} years old. The mother of {name} is {times} times as old. "
            "How old was she {years} years ago?",
            "{name} is {age}, and {his} mother is {times} times as old. How old was the mother {years} years ago?",
        ),
        (
            "The mother is [age * times = now] years old.",
            "{years} years ago she was [now - years = then] years old.",
        ),
        {"age": (6, 16)},
        {"times": (3, 5), "years": (2, 12)},
    ),
    Template(
        (
            "A machine makes {rate} toys an hour. It runs {hours} hours a day for {days} days, and {bad} toys "
            "are broken. "
            "How many good toys are there?",
            "For {days} days a machine runs {hours} hours a day and makes {rate} toys an hour. "
            "Of these {bad} are broken. "
            "How many are good?",
        ),
        (
            "The machine runs [hours * days = time] hours.",
            "It makes [time * rate = made] toys.",
            "There are [made - bad = good] good toys.",
        ),
        {"rate": (3, 9), "bad": (2, 20)},
        {"hours": (2, 5), "days": (2, 5)},
    ),
    Template(
        (
            "{name} pours {a} cups of {drink} and {b} cups of water into a bowl. "
            "{He} fills {glasses} glasses with {each} cups "
            "each and drinks {drunk} cups from the bowl. How many cups are left in the bowl?",
            "A bowl gets {a} cups of {drink} and {b} cups of water. "
            "{name} fills {glasses} glasses with {each} cups each and "
            "then drinks {drunk} cups from the bowl. How many cups does the bowl still have?",
        ),
        (
            "The bowl has [a + b = bowl] cups.",
            "The glasses take [glasses * each = taken] cups.",
            "Then there are [bowl - taken = some] cups.",
            "After drinking there are [some - drunk = left] cups.",
        ),
        {"a": (8, 30), "b": (8, 30)},
        {"glasses": (2, 6), "each": (2, 4), "drunk": (2, 8)},
    ),
    Template(
        (
            "{name} has {boxes} boxes of {a} {fruit} and {bags} bags of {b} {fruit}. "
            "{He} shares all of them equally among "
            "{people} people. How many {fruit} does each person get?",
            "{people} people share {boxes} boxes of {a} {fruit} and {bags} bags of {b} {fruit} equally. "
            "How many {fruit} are there for each person?",
        ),
        (
            "The boxes hold [boxes * a = first] {fruit}.",
            "The bags hold [bags * b = second] {fruit}.",
            "Together that is [first + second = total] {fruit}.",
            "Each person gets [total / people = share] {fruit}.",
        ),
        {"boxes": (2, 6), "a": (4, 9), "bags": (2, 6), "b": (3, 9)},
        {"people": (3, 6)},
    ),
)
