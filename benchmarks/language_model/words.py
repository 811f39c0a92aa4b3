# SPDX-License-Identifier: Apache-2.0
"""Common English words by category, written by hand: what lists, letters and word forms are made of."""

from __future__ import annotations


def listed(words: str) -> tuple[str, ...]:
    """The words of a line."""
    return tuple(words.split())


# No word stands in two categories: "the animal in the list" has one right answer.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": listed(
        "ant bear beaver bee beetle bird bison boar butterfly camel cat chicken cow crab cricket crocodile deer dog "
        "dolphin donkey dove dragonfly duck eagle elephant fish flamingo fox frog giraffe goat goose gorilla "
        "hamster hedgehog hippopotamus horse jellyfish kangaroo koala leopard lion lizard llama lobster monkey "
        "moose mosquito mouse octopus otter owl panda parrot peacock penguin pig rabbit raccoon rat rhinoceros "
        "rooster scorpion seal shark sheep shrimp skunk sloth snail snake spider squid squirrel swan tiger turtle "
        "whale wolf worm zebra"
    ),
    "fruit": listed(
        "apple apricot avocado banana blackberry blueberry cherry coconut fig grape grapefruit kiwi lemon mango "
        "melon nectarine papaya peach pear pineapple plum pomegranate raspberry strawberry tangerine watermelon"
    ),
    "vegetable": listed(
        "asparagus broccoli cabbage carrot cauliflower celery cucumber eggplant garlic leek lettuce onion parsnip "
        "potato pumpkin radish spinach turnip zucchini"
    ),
    "colour": listed(
        "red blue green yellow white black brown pink purple grey beige crimson magenta maroon scarlet turquoise "
        "violet indigo"
    ),
    "vehicle": listed(
        "airplane ambulance bicycle bus canoe car ferry helicopter lorry minibus motorcycle sailboat scooter ship "
        "submarine taxi tractor train tram truck van yacht"
    ),
    "musical instrument": listed(
        "accordion banjo cello clarinet drum flute guitar harp oboe piano saxophone trombone trumpet tuba ukulele "
        "violin xylophone"
    ),
    "piece of clothing": listed(
        "apron bikini blouse cardigan coat dress gloves hat jacket jeans kimono pyjamas sari scarf shirt shorts "
        "skirt socks sweater trousers vest"
    ),
    "part of the body": listed(
        "ankle arm brain chin ear elbow eye finger foot forehead hand hip knee leg lip lung mouth neck nose "
        "shoulder skull stomach thumb toe tongue tooth wrist"
    ),
    "profession": listed(
        "actor architect artist astronaut baker barber butcher carpenter chef dentist detective doctor electrician "
        "engineer farmer firefighter gardener journalist judge lawyer librarian mechanic nurse painter photographer "
        "pilot plumber poet priest sailor scientist singer soldier surgeon tailor teacher waiter"
    ),
    "sport": listed(
        "badminton baseball basketball boxing cycling fencing football golf gymnastics handball hockey judo "
        "lacrosse rowing rugby sailing skiing softball surfing swimming tennis volleyball wrestling"
    ),
    "piece of furniture": listed(
        "armchair bed bench bookcase chair couch cupboard desk dresser sofa stool table wardrobe"
    ),
    "drink": listed("beer cider cocoa coffee juice lemonade milk tea vodka water whisky wine"),
    "tool": listed("axe chisel drill hammer ladder rake saw screwdriver shovel spade wrench"),
    "weekday": listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "month": listed("January February March April May June July August September October November December"),
    "country": listed(
        "Argentina Australia Austria Belgium Brazil Canada Chile China Colombia Cuba Denmark Egypt Ethiopia Finland "
        "France Germany Greece Hungary Iceland India Indonesia Iran Iraq Ireland Israel Italy Japan Kenya Mexico "
        "Mongolia Morocco Nepal Netherlands Nigeria Norway Pakistan Peru Poland Portugal Romania Russia Spain Sudan "
        "Sweden Switzerland Syria Thailand Uganda Ukraine Vietnam"
    ),
    "city": listed(
        "Amsterdam Athens Baghdad Bangkok Barcelona Berlin Boston Brussels Cairo Chicago Delhi Dublin Hamburg "
        "Helsinki Istanbul Karachi Lagos Lima Lisbon London Madrid Manila Melbourne Milan Moscow Munich Nairobi "
        "Oslo Paris Prague Rome Seattle Seoul Shanghai Stockholm Sydney Tokyo Toronto Vienna Warsaw"
    ),
    "number": listed(
        "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen twenty thirty forty "
        "fifty sixty seventy eighty ninety"
    ),
    "family member": listed(
        "aunt brother cousin daughter father grandfather grandmother husband mother nephew niece sister son uncle wife"
    ),
}

PLURALS = {
    "country": "countries",
    "city": "cities",
    "piece of clothing": "pieces of clothing",
    "part of the body": "parts of the body",
    "piece of furniture": "pieces of furniture",
}

# Other things, so that lists are not all of a kind.
THINGS: tuple[str, ...] = listed(
    "anchor backpack ball balloon basket bathtub battery bell bomb bone book bottle box bread brick bridge broom "
    "bucket butter cactus calendar camera candle castle chain church cinema clock cloud coin comb compass cookie "
    "crayon crown curtain door egg elevator envelope fire flag flower fork fountain garden glass hospital hotel "
    "house ice island key knife lamp leaf letter library magnet map market medal mirror mountain museum mushroom "
    "needle newspaper notebook oven page paper pen pencil pepper picture pillow pizza plate prison radio rain "
    "ribbon ring river road robot rocket roof rope salt school scissors shadow shield snow soap sponge spoon stairs "
    "star station stone storm street suitcase sun sword telescope television tent theatre thermometer ticket toilet "
    "towel tower toy tree umbrella valley village volcano wall wallet window wing wood"
)

NOUNS: tuple[str, ...] = listed(
    "apple baby bag ball bank bed bird boat book bottle box boy branch bridge brother brush bus bush butterfly cake "
    "car cat chair child church city class clock cloud coat country cup desk diary dish doctor dog door dress duck "
    "ear egg engine eye face factory family farm father finger fish flag floor flower fly foot fork fox friend "
    "garden gate girl glass glove goose hand hat head hero hill horse hospital hotel house idea island job key "
    "kitchen knee knife lady lake lamp leaf leg letter library life lion man map market match memory mirror monkey "
    "month mother mountain mouse nail name nation nest night nose nurse office orange park party path pen pencil "
    "person phone photo piano picture pig plane plant plate pocket poem potato prize queen question rabbit radio "
    "river road roof room rose school secret shelf ship shirt shoe shop sister sky snake song spoon star station "
    "stone store story street student table tail taxi teacher test thief tomato tooth tower town toy train tree "
    "truck uncle village voice wall watch wave wife window wing wolf woman word year zoo baker battery beach bell "
    "bench berry body bone bowl brick candle castle cherry circle college colour copy cousin cow crowd daisy "
    "daughter dream enemy event fairy field film fire game gift group half heart hobby holiday hour inch insect "
    "jacket judge kiss kite ladder lesson loaf lorry meal message minute movie museum neck needle number ocean page "
    "palace parent peach penny player pony puppy reason ring rule scarf seat shadow sheep spy stick storm "
    "strawberry sweet task tent thumb tiger tool valley victory visitor week whale wheel wish witch world worker"
)

# Verbs whose past tense and participle are not in doubt (no "dreamed or dreamt").
VERBS: tuple[str, ...] = listed(
    "accept add admire agree allow answer appear arrive ask attack bake become begin believe bite blow borrow break "
    "bring build buy call carry catch cause change chase choose clean climb close collect come complain cook copy "
    "count cover crash create cry cut dance decide deliver deny describe deserve design destroy develop dig "
    "discover discuss divide do draw drink drive drop eat end enjoy enter escape examine explain explore fail fall "
    "feed feel fight fill find finish fix fly follow forget forgive freeze gather give go grab grow guess happen "
    "hate have hear help hide hit hold hope hug hunt hurry hurt imagine improve include invent invite join jump "
    "keep kick kill know laugh lead leave lend let like listen live look lose love make manage marry measure meet "
    "melt mention miss mix move need notice obey offer open order own pack paint pass pay perform pick plan play "
    "point prefer prepare pray protect provide pull punish push put reach read receive refuse remember remove "
    "repair repeat reply rest return ride ring rise rob run save say scream search see sell send serve shake share "
    "shoot shout show shut sing sink sit sleep smile speak spend stand start stay steal stick stop study suffer "
    "suggest supply support swim take talk taste teach tear tell thank think throw tie touch travel treat trust try "
    "turn type understand use visit wait walk want wash watch wear win wipe wish work worry write"
)

ADJECTIVES: tuple[str, ...] = listed(
    "big small tall short long wide deep high low fast slow hot cold warm cool old young new rich poor strong weak "
    "hard soft light dark bright clean dirty dry wet happy sad angry hungry thirsty lazy busy easy early late thick "
    "thin fat heavy cheap kind brave calm clear close dear dull fair fine firm flat fresh full funny gentle good "
    "bad great green grey healthy humble large lonely loud lovely lucky mad narrow near neat nice noisy odd pale "
    "plain polite pretty proud pure quick quiet rare ready red rough round rude safe sharp shiny shy silly simple "
    "sleepy smart smooth steep strange strict sunny sweet tasty tidy tiny tough ugly white wild windy wise crazy "
    "creamy curly dusty fierce filthy foggy friendly gloomy grand greasy grim handy harsh hairy icy juicy keen "
    "lively messy mild nasty naughty oily rainy ripe rusty salty scary sick slim smelly spicy sticky stormy tame "
    "wealthy weird black blue bold brief cloudy clever cruel cute dense"
)

# Each is the usual opposite of the other.
OPPOSITES: tuple[tuple[str, str], ...] = tuple(
    (first, second)
    for first, second in (
        pair.split("-")
        for pair in listed(
            "hot-cold big-small high-low up-down left-right day-night black-white open-closed happy-sad fast-slow "
            "rich-poor young-old wet-dry full-empty strong-weak early-late love-hate true-false good-bad "
            "clean-dirty thick-thin deep-shallow wide-narrow hard-soft light-dark first-last inside-outside "
            "above-below before-after always-never everything-nothing more-less buy-sell give-take push-pull "
            "win-lose start-finish remember-forget arrive-depart ask-answer laugh-cry live-die enter-exit rise-fall "
            "increase-decrease accept-reject agree-disagree appear-disappear attack-defend borrow-lend "
            "build-destroy float-sink lock-unlock pass-fail question-reply safe-dangerous sharp-blunt rough-smooth "
            "sweet-sour tall-short tight-loose top-bottom ugly-beautiful victory-defeat war-peace wise-foolish "
            "noisy-quiet guilty-innocent heaven-hell hero-villain husband-wife king-queen male-female man-woman "
            "maximum-minimum morning-evening north-south east-west odd-even parent-child past-future poverty-wealth "
            "public-private question-answer success-failure summer-winter sunrise-sunset teacher-student truth-lie "
            "visible-invisible possible-impossible legal-illegal polite-rude patient-impatient honest-dishonest "
            "healthy-sick heavy-light cheap-expensive brave-cowardly boring-interesting alive-dead absent-present "
            "asleep-awake bitter-sweet blunt-sharp bright-dim common-rare complex-simple cruel-kind difficult-easy "
            "entrance-exit expand-contract export-import external-internal fresh-stale friend-enemy "
            "generous-selfish gain-loss humble-proud include-exclude junior-senior lazy-hardworking lead-follow "
            "long-short major-minor near-far negative-positive new-old normal-abnormal nobody-everybody "
            "optimist-pessimist plural-singular profit-loss raw-cooked right-wrong same-different send-receive "
            "show-hide single-married sober-drunk solid-liquid straight-crooked tame-wild temporary-permanent "
            "upper-lower vertical-horizontal well-badly with-without yes-no guest-host front-back bride-groom "
            "ancient-modern artificial-natural backward-forward begin-end create-destroy curse-bless descend-ascend "
            "freeze-melt frequent-rare giant-dwarf hope-despair joy-sorrow land-sea often-seldom "
            "plus-minus praise-criticize reward-punishment strength-weakness uncle-aunt brother-sister nephew-niece "
            "son-daughter father-mother boy-girl actor-actress"
        )
    )
)
