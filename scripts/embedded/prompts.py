"""Write varied chat prompts for a small assistant model.

The prompts are short English questions and requests, made from templates over lists of subjects that were written for
this file; none comes from a published test set.  `prompts(count, seed)` returns `count` distinct ones in a mixed order,
the same for the same arguments.  Every category has a fixed share of the whole, and inside a category every subject is
used once before any is used twice.  Only the standard library is needed.

    python scripts/embedded/prompts.py 20 [seed]
"""

import random
import sys


def _split(text: str) -> list[str]:
    """The parts of `text` between semicolons, each with its white space made single."""
    return [" ".join(part.split()) for part in text.split(";") if part.strip()]


def _groups(items: str, templates: list[str]) -> list[list[str]]:
    """For every item, or "first:second" pair, all templates filled in with it."""
    result = []
    for item in _split(items):
        first, _, second = item.partition(":")
        filled = [template.replace("{x}", first).replace("{y}", second) for template in templates]
        result.append([text[0].upper() + text[1:] for text in filled])
    return result


COUNTRIES = """
Afghanistan:Kabul; Albania:Tirana; Algeria:Algiers; Andorra:Andorra la Vella; Angola:Luanda; Argentina:Buenos Aires;
Armenia:Yerevan; Australia:Canberra; Austria:Vienna; Azerbaijan:Baku; the Bahamas:Nassau; Bahrain:Manama;
Bangladesh:Dhaka; Barbados:Bridgetown; Belarus:Minsk; Belgium:Brussels; Belize:Belmopan; Benin:Porto-Novo;
Bhutan:Thimphu; Bolivia:Sucre; Bosnia and Herzegovina:Sarajevo; Botswana:Gaborone; Brazil:Brasília;
Brunei:Bandar Seri Begawan; Bulgaria:Sofia; Burkina Faso:Ouagadougou; Burundi:Gitega; Cambodia:Phnom Penh;
Cameroon:Yaoundé; Canada:Ottawa; Cape Verde:Praia; the Central African Republic:Bangui; Chad:N'Djamena;
Chile:Santiago; China:Beijing; Colombia:Bogotá; Comoros:Moroni; Costa Rica:San José; Croatia:Zagreb; Cuba:Havana;
Cyprus:Nicosia; the Czech Republic:Prague; the Democratic Republic of the Congo:Kinshasa; Denmark:Copenhagen;
Djibouti:Djibouti City; Dominica:Roseau; the Dominican Republic:Santo Domingo; Ecuador:Quito; Egypt:Cairo;
El Salvador:San Salvador; Equatorial Guinea:Malabo; Eritrea:Asmara; Estonia:Tallinn; Eswatini:Mbabane;
Ethiopia:Addis Ababa; Fiji:Suva; Finland:Helsinki; France:Paris; Gabon:Libreville; the Gambia:Banjul; Georgia:Tbilisi;
Germany:Berlin; Ghana:Accra; Greece:Athens; Grenada:St. George's; Guatemala:Guatemala City; Guinea:Conakry;
Guinea-Bissau:Bissau; Guyana:Georgetown; Haiti:Port-au-Prince; Honduras:Tegucigalpa; Hungary:Budapest;
Iceland:Reykjavik; India:New Delhi; Indonesia:Jakarta; Iran:Tehran; Iraq:Baghdad; Ireland:Dublin; Israel:Jerusalem;
Italy:Rome; Ivory Coast:Yamoussoukro; Jamaica:Kingston; Japan:Tokyo; Jordan:Amman; Kazakhstan:Astana; Kenya:Nairobi;
Kiribati:Tarawa; Kuwait:Kuwait City; Kyrgyzstan:Bishkek; Laos:Vientiane; Latvia:Riga; Lebanon:Beirut; Lesotho:Maseru;
Liberia:Monrovia; Libya:Tripoli; Liechtenstein:Vaduz; Lithuania:Vilnius; Luxembourg:Luxembourg City;
Madagascar:Antananarivo; Malawi:Lilongwe; Malaysia:Kuala Lumpur; the Maldives:Malé; Mali:Bamako; Malta:Valletta;
the Marshall Islands:Majuro; Mauritania:Nouakchott; Mauritius:Port Louis; Mexico:Mexico City; Micronesia:Palikir;
Moldova:Chișinău; Monaco:Monaco; Mongolia:Ulaanbaatar; Montenegro:Podgorica; Morocco:Rabat; Mozambique:Maputo;
Myanmar:Naypyidaw; Namibia:Windhoek; Nepal:Kathmandu; the Netherlands:Amsterdam; New Zealand:Wellington;
Nicaragua:Managua; Niger:Niamey; Nigeria:Abuja; North Korea:Pyongyang; North Macedonia:Skopje; Norway:Oslo;
Oman:Muscat; Pakistan:Islamabad; Palau:Ngerulmud; Panama:Panama City; Papua New Guinea:Port Moresby;
Paraguay:Asunción; Peru:Lima; the Philippines:Manila; Poland:Warsaw; Portugal:Lisbon; Qatar:Doha;
the Republic of the Congo:Brazzaville; Romania:Bucharest; Russia:Moscow; Rwanda:Kigali; Saint Lucia:Castries;
Samoa:Apia; San Marino:San Marino; Saudi Arabia:Riyadh; Senegal:Dakar; Serbia:Belgrade; the Seychelles:Victoria;
Sierra Leone:Freetown; Singapore:Singapore; Slovakia:Bratislava; Slovenia:Ljubljana; the Solomon Islands:Honiara;
Somalia:Mogadishu; South Africa:Pretoria; South Korea:Seoul; South Sudan:Juba; Spain:Madrid; Sri Lanka:Colombo;
Sudan:Khartoum; Suriname:Paramaribo; Sweden:Stockholm; Switzerland:Bern; Syria:Damascus; Taiwan:Taipei;
Tajikistan:Dushanbe; Tanzania:Dodoma; Thailand:Bangkok; Togo:Lomé; Tonga:Nuku'alofa;
Trinidad and Tobago:Port of Spain; Tunisia:Tunis; Turkey:Ankara; Turkmenistan:Ashgabat; Tuvalu:Funafuti;
Uganda:Kampala; Ukraine:Kyiv; the United Arab Emirates:Abu Dhabi; the United Kingdom:London;
the United States:Washington, D.C.; Uruguay:Montevideo; Uzbekistan:Tashkent; Vanuatu:Port Vila; Venezuela:Caracas;
Vietnam:Hanoi; Yemen:Sana'a; Zambia:Lusaka; Zimbabwe:Harare
"""
CAPITAL = [
    "What is the capital of {x}?",
    "Which city is the capital of {x}?",
    "Name the capital city of {x}.",
    "Tell me the capital of {x}.",
    "What's the capital city of {x}?",
]
COUNTRY = [
    "Which continent is {x} in?",
    "What language do people speak in {x}?",
    "What currency is used in {x}?",
    "Where is {x}?",
    "What is {x} famous for?",
    "Tell me a little about {x}.",
    "Name a traditional dish from {x}.",
    "Tell me one interesting fact about {x}.",
    "What is the weather like in {x}?",
    "In which country is the city of {y}?",
    "Which countries share a border with {x}, if any?",
    "Why do tourists visit {x}?",
]
PEOPLE = """
Albert Einstein; Isaac Newton; Marie Curie; Charles Darwin; Galileo Galilei; Leonardo da Vinci; Michelangelo;
William Shakespeare; Jane Austen; Charles Dickens; Mark Twain; Leo Tolstoy; Homer; Plato; Aristotle; Socrates;
Confucius; Cleopatra; Julius Caesar; Alexander the Great; Napoleon Bonaparte; Genghis Khan; Queen Victoria;
Elizabeth I; Joan of Arc; George Washington; Abraham Lincoln; Thomas Jefferson; Benjamin Franklin;
Martin Luther King Jr.; Rosa Parks; Nelson Mandela; Mahatma Gandhi; Winston Churchill; Amelia Earhart;
Neil Armstrong; Yuri Gagarin; Christopher Columbus; Marco Polo; Ferdinand Magellan; Thomas Edison; Nikola Tesla;
Alexander Graham Bell; the Wright brothers; Johannes Gutenberg; Louis Pasteur; Alexander Fleming;
Florence Nightingale; Alan Turing; Ada Lovelace; Stephen Hawking; Wolfgang Amadeus Mozart; Ludwig van Beethoven;
Johann Sebastian Bach; Vincent van Gogh; Pablo Picasso; Claude Monet; Frida Kahlo; Rembrandt; Walt Disney;
Charlie Chaplin; Helen Keller; Anne Frank; Mother Teresa; Pelé; Muhammad Ali; Gregor Mendel; Archimedes; Euclid
"""
PERSON = [
    "Who was {x}?",
    "What is {x} known for?",
    "In which century did {x} live?",
    "Tell me one thing about {x}.",
    "Why is {x} remembered today?",
]
INVENTIONS = """
the telephone; the light bulb; the steam engine; the printing press; the airplane; the radio; the television;
the telescope; the microscope; the bicycle; the camera; the World Wide Web; the battery; the piano; the sewing machine;
the thermometer; dynamite; the elevator; the typewriter; the diesel engine; the helicopter; the parachute;
the zipper; the refrigerator; the microwave oven; the ballpoint pen; the transistor; the smallpox vaccine;
the hot air balloon; the stethoscope; the saxophone; the barometer; the safety razor; the traffic light; the lighthouse
"""
INVENTION = ["Who invented {x}?", "When was {x} invented?", "Why was the invention of {x} useful?"]
EVENTS = """
World War I begin; World War II end; the French Revolution begin; the American Civil War end; the Berlin Wall fall;
the first people land on the Moon; the Titanic sink; the Roman Empire fall in the west; Columbus reach America;
the United States declare independence; the Great Fire of London happen; the Great Depression begin;
the Soviet Union break up; the first modern Olympic Games take place; the Black Death reach Europe;
the Russian Revolution happen; India become independent; the Battle of Waterloo take place; the Euro come into use;
the Suez Canal open; the Panama Canal open; the Magna Carta get signed; the Chernobyl accident happen;
the first satellite go into space; the Norman conquest of England happen; Vesuvius bury Pompeii;
the Wright brothers make their first flight; women get the vote in New Zealand; the Eiffel Tower open;
the Industrial Revolution start; the California Gold Rush begin; the United Nations get founded;
the Cuban Missile Crisis happen; apartheid end in South Africa; the Hubble telescope go into orbit
"""
EVENT = ["When did {x}?", "In what year did {x}?"]
BOOKS = """
Pride and Prejudice; Hamlet; Romeo and Juliet; Macbeth; Moby-Dick; War and Peace; Anna Karenina; Don Quixote;
The Odyssey; The Iliad; Great Expectations; Oliver Twist; A Christmas Carol; Jane Eyre; Wuthering Heights;
Frankenstein; Dracula; Treasure Island; Robinson Crusoe; Gulliver's Travels; Alice's Adventures in Wonderland;
The Adventures of Tom Sawyer; The Time Machine; The War of the Worlds; The Jungle Book; Peter Pan; Little Women;
The Great Gatsby; Nineteen Eighty-Four; Animal Farm; The Hobbit; The Little Prince; Crime and Punishment;
The Count of Monte Cristo; Les Misérables; The Divine Comedy; The Canterbury Tales; Black Beauty;
Twenty Thousand Leagues Under the Seas; The Picture of Dorian Gray; The Call of the Wild; The Secret Garden
"""
BOOK = ["Who wrote {x}?", "What is {x} about?", "Name the author of the book {x}.", "Who is the main character of {x}?"]
PLANETS = "Mercury; Venus; Mars; Jupiter; Saturn; Uranus; Neptune; Pluto"
PLANET = [
    "How far is {x} from the Sun?",
    "What is {x} made of?",
    "Does {x} have moons?",
    "How big is {x}?",
    "What is it like on {x}?",
    "How did {x} get its name?",
]
ANIMALS = """
elephants; lions; tigers; pandas; koalas; kangaroos; giraffes; zebras; penguins; polar bears; dolphins; blue whales;
sharks; octopuses; sea turtles; crocodiles; snakes; frogs; salmon; eagles; owls; parrots; hummingbirds; ostriches;
bats; wolves; foxes; rabbits; squirrels; hedgehogs; beavers; otters; camels; horses; cows; sheep; goats; pigs; chickens;
ducks; cats; dogs; honeybees; ants; butterflies; spiders; earthworms; snails; gorillas; chimpanzees; cheetahs;
hippos; rhinos; moose; reindeer; sloths; flamingos; jellyfish; seahorses; crabs
"""
ANIMAL = [
    "What do {x} eat?",
    "Where do {x} live?",
    "How long do {x} usually live?",
    "How do {x} protect themselves?",
    "What sound do {x} make, if any?",
    "What is special about {x}?",
    "How do {x} look after their young?",
]
BODY = """
heart; brain; liver; stomach; skin; spine; skull; tongue; nose; thyroid; pancreas; spleen; bladder; diaphragm;
small intestine; large intestine; rib cage; eardrum; retina; immune system; nervous system
"""
ORGAN = ["What does the {x} do?", "Where in the body is the {x}?", "How can I keep my {x} healthy?"]
ELEMENTS = """
hydrogen; helium; lithium; carbon; nitrogen; oxygen; fluorine; neon; sodium; magnesium; aluminum; silicon; phosphorus;
sulfur; chlorine; argon; potassium; calcium; titanium; iron; nickel; copper; zinc; silver; tin; iodine; tungsten;
platinum; gold; mercury; lead; uranium
"""
ELEMENT = [
    "What is the chemical symbol for {x}?",
    "What is {x} used for?",
    "Is {x} a metal?",
    "What does {x} look like at room temperature?",
    "Where do we find {x} in nature?",
]
PLACES = """
the Eiffel Tower; the Great Wall of China; the Taj Mahal; the Colosseum; Machu Picchu; the Statue of Liberty;
Mount Everest; Mount Kilimanjaro; Mount Fuji; the Grand Canyon; Niagara Falls; Victoria Falls; the Amazon River;
the Nile; the Danube; the Mississippi River; the Sahara; the Gobi Desert; the Alps; the Andes; the Himalayas;
the Rocky Mountains; the Great Barrier Reef; the Dead Sea; the Black Sea; Lake Victoria; Lake Baikal; Stonehenge;
the Great Pyramid of Giza; Petra; Angkor Wat; the Acropolis; Big Ben; the Golden Gate Bridge; the Panama Canal;
Antarctica; Greenland; Easter Island; Yellowstone National Park; the Sydney Opera House
"""
PLACE = ["Where is {x}?", "What is {x}?", "Why is {x} famous?", "Tell me two facts about {x}."]
FACTS = """
What is the largest ocean on Earth?; What is the longest river in South America?; Which continent has the most countries?;
How many continents are there?; What is the smallest country in the world?; Which country has the most people?;
What is the tallest animal?; What is the fastest land animal?; What is the largest animal on Earth?;
How many days are in a leap year?; How many minutes are in a day?; How many legs does a spider have?;
What color do you get when you mix blue and yellow?; What color do you get when you mix red and white?;
At what temperature does water boil?; At what temperature does water freeze?; What gas do plants take in?;
What is the chemical formula of water?; What is table salt made of?; What is the hardest natural material?;
How many planets are in the solar system?; Which planet is closest to the Sun?; Which planet has the brightest rings?;
How long does light from the Sun take to reach us?; How many bones does an adult have?; How many teeth do adults have?;
What is the largest organ of the human body?; How many sides does a hexagon have?; What is half of ninety?;
What is twelve times five?; How many letters are in the English alphabet?; Which month has the fewest days?;
What comes after Thursday?; What are the primary colors?; How many strings does a violin have?;
What language has the most native speakers?; Which metal is liquid at room temperature?; What is steel made from?;
What is glass made from?; What is paper made from?; Where does chocolate come from?; Where does silk come from?;
What is the currency of the European Union?; What are the official languages of Switzerland?; What is a baby goat called?;
What is a baby swan called?; What do you call a group of wolves?; What do you call a group of fish?;
Which bird cannot fly?; What is the coldest place on Earth?; What is the driest desert in the world?;
Why is the sky blue?; Why is the sea salty?; Why do leaves fall in autumn?; Why do cats purr?; Why do we yawn?;
Why do we dream?; Why do onions make us cry?; Why does ice float?; Why does the Moon change shape?; Why do we have seasons?;
How do birds find their way?; How do fish breathe?; How do bees make honey?; How many players are on a soccer team?;
How many rings are on the Olympic flag?; Which sport uses a shuttlecock?; How long is a marathon?;
Who painted the Mona Lisa?; Who painted The Starry Night?; Who composed The Four Seasons?; Who composed the Ninth Symphony?;
What are the seven colors of the rainbow?; Which vitamin do we get from sunlight?; Which fruit has its seeds on the outside?
"""

ONE = """
gravity; photosynthesis; evolution; electricity; magnetism; friction; energy; heat; light; sound; the speed of light;
the water cycle; the carbon cycle; the food chain; the solar system; the Milky Way; the Sun; the Moon; the ozone layer;
the atmosphere; the greenhouse effect; climate change; global warming; renewable energy; solar energy; wind power;
nuclear energy; recycling; pollution; deforestation; biodiversity; an ecosystem; a habitat; natural selection; DNA;
genetics; the cell; digestion; blood circulation; the immune system; the nervous system; respiration; sleep; memory;
nutrition; protein; fiber; vitamin C; calcium; cholesterol; exercise; yoga; meditation; stress; mental health;
first aid; hygiene; hydration; a balanced diet; the scientific method; an experiment; an atom; a molecule; density;
pressure; temperature; an acid; rust; oxidation; evaporation; condensation; a chemical reaction; the periodic table;
a rainbow; lightning; a hurricane; a tornado; a glacier; a desert; a rainforest; a coral reef; an island; a wetland;
the Arctic; soil; erosion; plate tectonics; the rock cycle; a fossil; an eclipse; a comet; a black hole; a galaxy;
the Big Bang; space exploration; the International Space Station; the telescope; the microscope; the compass;
ancient Egypt; ancient Greece; ancient Rome; the Roman Empire; the Ottoman Empire; the Inca Empire; the Silk Road;
the Middle Ages; the Renaissance; the Enlightenment; the Industrial Revolution; the French Revolution; the Cold War;
the space race; the printing press; democracy; a republic; monarchy; a constitution; human rights; freedom of speech;
voting; the United Nations; the European Union; justice; law; citizenship; diplomacy; trade; inflation; supply and demand;
a budget; saving money; interest; insurance; tax; a bank; a market; entrepreneurship; marketing; teamwork; leadership;
time management; communication; critical thinking; creativity; problem solving; curiosity; empathy; honesty; kindness;
patience; friendship; gratitude; respect; courage; responsibility; education; reading; writing; handwriting; grammar;
poetry; fiction; mythology; folklore; philosophy; logic; mathematics; algebra; geometry; statistics; probability; zero; pi;
a computer; the Internet; a web browser; a search engine; email; software; hardware; an algorithm; programming;
a variable in programming; a database; a computer network; Wi-Fi; Bluetooth; GPS; encryption; a password; cybersecurity;
cloud computing; artificial intelligence; machine learning; a neural network; robotics; 3D printing; open source software;
Python; HTML; a smartphone; social media; a digital camera; virtual reality; an electric car; a battery; an engine;
public transport; aviation; architecture; sculpture; painting; photography; pottery; impressionism; cubism; classical music;
jazz; opera; ballet; rhythm; harmony; theater; cinema; animation; dance; fashion; origami; calligraphy; gardening;
composting; agriculture; irrigation; fishing; beekeeping; cooking; baking; bread; cheese; chocolate; coffee; tea; rice;
olive oil; honey; salt; sugar; fermentation; breakfast; camping; hiking; swimming; cycling; running; soccer; basketball;
tennis; chess; the Olympic Games; a hobby; a library; a museum; a school; a hospital; a family; a neighborhood;
volunteering; charity; tradition; culture; language; translation; tourism; a passport; a map; a calendar; a clock;
money; glass; paper; plastic; steel; concrete; wood; cotton; wool; silk; rubber; gold; oil; coal; natural gas; clean water;
the ocean; the weather; winter; spring; music; laughter; a smile; play; art; science; history; nature; technology
"""
MANY = """
volcanoes; earthquakes; tsunamis; clouds; stars; planets; asteroids; satellites; tides; mountains; rivers; lakes; forests;
trees; flowers; seeds; mushrooms; insects; bees; birds; mammals; reptiles; amphibians; dinosaurs; whales; wolves; bacteria;
viruses; vaccines; antibiotics; vitamins; enzymes; hormones; muscles; bones; allergies; genes; crystals; metals; magnets;
solar panels; wind turbines; dams; bridges; castles; pyramids; cathedrals; trains; ships; bicycles; airplanes; rockets;
robots; computer chips; video games; museums; libraries; festivals; holidays; fairy tales; novels; newspapers;
fruits; vegetables; spices; beans; nuts; pets; national parks; endangered species; fossil fuels; teachers; nurses; farmers
"""
TOPIC = [
    "Explain {x} in simple terms.",
    "Give three facts about {x}.",
    "Write a short paragraph about {x}.",
    "Tell me about {x}.",
    "Explain {x} to a child.",
    "Describe {x} in two sentences.",
    "Give me one interesting fact about {x}.",
    "How would you describe {x} to someone who has never heard of it?",
    "What should everyone know about {x}?",
    "What do people often get wrong about {x}?",
    "Can you explain {x} briefly?",
    "In one sentence, what can you say about {x}?",
    "Write a short introduction to {x}.",
    "I'm curious about {x}. What can you tell me?",
]
TOPIC_ONE = [
    "What is {x}?",
    "Why is {x} important?",
    "Give me an everyday example that involves {x}.",
    "What is {x}, in short?",
]
TOPIC_MANY = ["What are {x}?", "Why are {x} important?", "What different kinds of {x} are there?"]

WORKINGS = """
a refrigerator; a microwave oven; a vacuum cleaner; a washing machine; a dishwasher; an air conditioner; a toaster;
a light bulb; a thermometer; a compass; a camera; a telescope; a microscope; a radio; a television; a telephone; a printer;
a touch screen; a hard drive; a computer mouse; a search engine; a web browser; email; GPS; Wi-Fi; a bicycle;
a car engine; an electric motor; a battery; a solar panel; a wind turbine; a dam; a steam engine; a jet engine; a rocket;
a helicopter; a submarine; a parachute; a hot air balloon; an elevator; a traffic light; a lock and key; a zipper; a clock;
a pencil; a candle; soap; a vaccine; the heart; the eye; the ear; the stomach; memory; the stock market; a credit card;
a bank loan; a lighthouse; a greenhouse; a compost heap; recycling; yeast in bread; a piano; a guitar; a fire extinguisher
"""
WORKING = ["How does {x} work?", "Can you explain how {x} works?", "In simple words, how does {x} work?"]
GOALS = """
sleep better; drink more water; eat more vegetables; lose weight safely; build muscle at home; start running; improve my
posture; reduce stress; calm down before an exam; stay motivated; stop procrastinating; break a bad habit; build a good
habit; wake up early; feel more confident; be more patient; deal with anger; relax after work; take care of my teeth;
protect my skin from the sun; treat a small cut; get rid of hiccups; ease a headache; recover from a cold; spend less
time on my phone; study for a test; take good notes; remember new words; learn a language; learn to play the guitar;
learn to draw; learn to program; improve my handwriting; read faster; write a good essay; write a short story; write a
poem; give a good speech; overcome stage fright; improve my spelling; get better at math; concentrate while studying;
plan my week; finish my homework on time; choose a college major; find a good book; boil an egg; cook rice; make
pancakes; bake bread; make a simple salad; make tomato soup; roast vegetables; cook pasta; make a cup of tea; make good
coffee; grill chicken; make an omelet; bake a chocolate cake; make mashed potatoes; cut an onion without crying; keep
herbs fresh; store leftovers; make pizza dough; make a smoothie; make lemonade; plan meals for the week; cook on a small
budget; sharpen a kitchen knife; prepare for a job interview; write a resume; write a cover letter; ask for a raise; get
along with a difficult coworker; run a short meeting; work well from home; give feedback to a colleague; handle
criticism; start a small business; find new customers; manage my time at work; write a clear email; say no politely;
network at an event; change careers; quit a job politely; clean a window; remove a coffee stain; remove ink from
clothes; wash a wool sweater; iron a shirt; fold a fitted sheet; organize my closet; organize my desk; unclog a sink;
fix a squeaky door; paint a room; hang a picture; save electricity; save water; reduce waste at home; grow tomatoes;
water houseplants; keep a cactus alive; start a vegetable garden; attract birds to my garden; start composting; keep
mosquitoes away; train a puppy; care for a kitten; set up a fish tank; choose a mattress; clean a keyboard; make a
strong password; back up my files; speed up a slow computer; protect my privacy online; take better photos; pack a
suitcase; plan a road trip; find cheap flights; avoid jet lag; stay safe while traveling; travel with small children;
prepare for a hike; set up a tent; read a map; learn a few words before a trip; pack for the beach; change a flat tire;
fix a bicycle chain; drive safely in snow; save money; make a budget; pay off a debt; make new friends; apologize to a
friend; cheer up a friend; throw a birthday party; choose a gift; write a thank-you note; start a conversation; be a
good listener; resolve an argument; wrap a present; tie a tie; teach a child to read; teach a child to swim; entertain
children on a rainy day; get over a disappointment; keep a diary; start meditating; take a good nap
"""
GOAL = [
    "How do I {x}?",
    "How can I {x}?",
    "What is the best way to {x}?",
    "Give me three tips to {x}.",
    "I want to {x}. Where should I start?",
    "I need to {x}. Any advice?",
    "What is one simple thing I can do to {x}?",
    "Can you help me {x}?",
    "What should I avoid when I try to {x}?",
]

LISTED = """
fruits; vegetables; berries; herbs; spices; kinds of nuts; types of bread; types of cheese; types of pasta; breakfast foods;
healthy snacks; desserts; soups; hot drinks; cold drinks; pizza toppings; sandwich ideas; farm animals; wild animals;
sea animals; birds; insects; reptiles; dog breeds; animals that can fly; animals that sleep in winter; flowers; trees;
garden tools; colors; shapes; musical instruments; kinds of music; kinds of dance; sports; water sports; winter sports;
ball games; board games; hobbies; indoor activities; outdoor activities; things to do on a rainy day; things to pack for a trip;
things to take to the beach; camping supplies; European countries; African countries; Asian countries; South American countries;
big cities; famous rivers; mountain ranges; oceans and seas; islands; languages; school subjects; classroom objects;
jobs; jobs in a hospital; jobs that involve travel; kinds of transport; parts of a car; parts of a house; pieces of furniture;
kitchen tools; household chores; electronic devices; programming languages; computer parts; uses of a computer;
items of clothing; kinds of shoes; parts of the body; human senses and what they do; emotions; good habits; good manners;
qualities of a good friend; qualities of a good leader; ways to save money; ways to save water; ways to help the environment;
ways to relax; ways to say hello; ways to say thank you; birthday gift ideas; party ideas; book genres; film genres;
art materials; metals; gases; kinds of weather; natural disasters; sources of energy; inventions that changed the world
"""
LIST = [
    "List five {x}.",
    "Name three {x}.",
    "Give me a list of four {x}.",
    "Can you name five {x}?",
    "List six {x}, one per line.",
    "I need ideas. Please list some {x}.",
    "Make a short numbered list of {x}.",
]

SUBJECTS = """
the sea; the moon; a rainy day; the first snow; autumn leaves; a spring morning; a summer night; a thunderstorm; a
rainbow; a sunflower; an old oak tree; a quiet forest; a mountain lake; a desert at dawn; a river; the stars; a
lighthouse; a small island; a lonely robot; a friendly dragon; a brave mouse; a lost puppy; a curious cat; a wise owl; a
clumsy bear; a singing whale; a shy turtle; a proud rooster; a fox in the city; two rival squirrels; a snail in a race;
a penguin who wants to fly; a bee looking for home; a spider and a fly; an old fisherman; a young painter; a night
watchman; a kind baker; a village teacher; a train driver; a forgetful wizard; a tired knight; a pirate who hates water;
a princess who builds machines; a giant who is afraid; a ghost in a library; a time traveler; an astronaut far from
home; a trip to Mars; a hidden treasure; a secret garden; a magic pencil; a talking mirror; a broken clock; a lost
letter; an old photograph; a red umbrella; a wooden boat; a paper kite; a music box; a missing key; an empty house; a
bridge between two towns; a night train; a long road; a busy market; a coffee shop; a bakery; a bookstore; a flower
shop; a bicycle shop; a toy store; a new soap; a brand of tea; a running shoe; a pizza restaurant; a music school; a
travel agency; a local library; an animal shelter; a recycling campaign; a town festival; a farmers' market; friendship;
courage; kindness; patience; hope; forgiveness; growing up; growing old; a grandmother's kitchen; a father's advice; a
sister's promise; the first day of school; the last day of summer; moving to a new city; coming home; learning to swim;
learning to dance; losing a game; winning a race; a birthday surprise; a picnic; a snowman; a campfire; a family dinner;
a cup of coffee; a slice of cake; the color blue; silence; time; a dream; a wish; a garden in winter; the wind; a
candle; the last tree on Earth; a city under the sea; a school for animals; a machine that makes clouds; the smell of
rain
"""
CREATE = [
    "Write a short poem about {x}.",
    "Write a four-line poem about {x}.",
    "Write a very short story about {x}.",
    "Write a slogan about {x}.",
    "Suggest a title for a story about {x}.",
    "Write the opening sentence of a story about {x}.",
    "Write a haiku about {x}.",
    "Describe {x} in three sentences.",
    "Tell me a bedtime story about {x}. Keep it short.",
]

PURPOSES = """
thanking a friend for a gift; inviting a neighbor to dinner; asking my boss for a day off; apologizing for being late;
congratulating a colleague on a promotion; asking a teacher for help; canceling a dentist appointment; rescheduling a
meeting; complaining about a late delivery; asking for a refund; ordering more office paper; wishing a friend a happy
birthday; wishing my grandmother a happy new year; announcing a new baby; saying goodbye to coworkers; resigning from a
job; applying for a summer job; following up after an interview; asking for a letter of recommendation; thanking a
teacher; reminding the team about a deadline; asking a landlord to fix the heating; welcoming a new employee;
introducing myself to a new team; telling a friend about my vacation; asking a neighbor to water my plants; inviting
friends to a barbecue; declining a wedding invitation; accepting a job offer; turning down a job offer; asking a library
to extend a loan; reporting a lost bag; booking a hotel room; asking a hotel about parking; thanking a host for dinner;
cheering up a sick friend; offering condolences; asking a friend to return a book; inviting parents to a school play;
asking a coach about practice times; thanking a volunteer; asking for a donation; sharing good news with family; asking
a coworker to review a report; explaining a delay to a customer; answering an unhappy customer; confirming an
appointment; asking for directions to an office; planning a weekend trip with a friend; asking for a quote from a
painter; telling a roommate to clean the kitchen; apologizing to a sister; thanking a doctor; wishing a team good luck;
asking a bank about an account; announcing an office party; asking a professor for more time; telling a neighbor about
loud music; inviting a speaker to a club; congratulating newlyweds; returning a broken lamp
"""
PURPOSE = [
    "Write a short email {x}.",
    "Write a friendly message {x}.",
    "Write a brief, polite letter {x}.",
    "Draft a two-sentence message {x}.",
    "Help me write a note {x}.",
]

SENTENCES = """
The cat slept on the warm windowsill all afternoon.; We missed the bus because it was raining.; She bought a red bicycle
last week.; My brother is learning to play the drums.; The old bridge was closed for repairs.; He forgot his keys and
had to wait outside.; The children built a castle out of sand.; Our meeting has been moved to Tuesday.; The soup was too
salty to eat.; I like to walk by the river in the evening.; The train was crowded, but everyone was friendly.; They
planted ten trees behind the school.; The movie was long and rather boring.; A strong wind blew the roof off the shed.;
She speaks three languages very well.; The museum is free on Sundays.; He fixed the radio with a paper clip.; The bakery
sells fresh bread every morning.; My phone battery runs out very quickly.; The dog chased the ball into the pond.; We
had a picnic near the lake.; The teacher gave us too much homework.; He always arrives early for work.; The new park has
a fountain and two playgrounds.; It was so cold that the pipes froze.; She found an old coin in the garden.; The report
must be finished by Friday.; I am tired because I stayed up late.; The farmer sold all his apples at the market.; Our
neighbors are moving to another city.; The computer is slow and needs more memory.; He painted the kitchen bright
yellow.; The lights went out during dinner.; The store was closed when we got there.; She wrote a long letter to her
aunt.; The river is deep and dangerous.; My sister wants to become a doctor.; The team lost the match but played well.;
We saw a deer at the edge of the forest.; The coffee here is cheap and good.; He told a funny story about his trip.; The
city is building a new tram line.; I can't find my glasses anywhere.; The baby laughed at the puppet.; They canceled the
concert because of the storm.; Her garden is full of roses and herbs.; The boat drifted slowly toward the shore.; He was
nervous about his first day at work.; The library bought two hundred new books.; The cake was gone before I got a
slice.; We need more chairs for the party.; The hotel room was small but clean.; She runs five kilometers every
morning.; The clock on the tower stopped at noon.; My uncle tells the same joke every year.; The snow covered the whole
village overnight.; He saved money for a year to buy a guitar.; The road to the cabin is steep and narrow.; The kids are
excited about the school trip.; Please send me the file as soon as you can.; The lake was so clear that we could see the
bottom.; She opened the window to let in some air.; The waiter brought the wrong order.; I enjoy cooking, but I hate
washing dishes.; The plane landed an hour late.; He reads the newspaper at breakfast.; The mountain was hidden in fog.;
The shop gives a discount to students.; They argued about the color of the curtains.; The old man fed the pigeons in the
square.; The plan is good, but it costs too much.; We watched the sunset from the roof.; The printer is out of paper
again.; She was happy to see her old friends.; The bird built a nest above our door.; He lost the game because he was
too confident.; The festival lasts for three days in July.; I would like to change my appointment.; The engine made a
strange noise.; The painting was sold for a high price.; My grandparents live on a small farm.; The students asked many
good questions.; It is important to drink enough water.; The company opened an office in Madrid.; The bread was hard and
dry.; She solved the puzzle in five minutes.; The garden needs water every day in summer.; He carried the heavy box up
the stairs.; The weather was perfect for sailing.; We took the wrong road and got lost.; The doctor told him to rest for
a week.; The room was dark and silent.; They named their dog after a planet.; The market opens at six in the morning.; I
think the blue one looks better.; The fire warmed the whole room.; She answered the phone in a quiet voice.; The bus
driver waited for the old lady.; He bought flowers on his way home.; The project was harder than we expected.; The
jacket is too big for me.; The fish swam in circles around the rock.; The choir sang beautifully at the wedding.; Our
house is near the station.; The exam was easy for those who studied.; The boy hid behind the big tree.; She is good at
fixing old clocks.; The beach was empty in the early morning.; The mayor thanked the firefighters.; The recipe needs two
eggs and some milk.; He walked to work to save money.; The island has no cars and very few roads.; The kitten climbed up
the curtain.; I was surprised by the quiet of the city.; The owner of the shop knows everyone in town.; They cleaned the
beach on Saturday morning.; The king gave a speech from the balcony.; The bicycle is a cheap and healthy way to travel.;
The price of bread went up again.; The hikers rested under a pine tree.; Honeybees visit many flowers each day. They
carry pollen from plant to plant. This helps fruit and seeds to grow.; The town built a new library. It has a reading
room and a small cafe. Many students now go there after school.; Maya wanted to learn the violin. She practiced every
day for a year. At the spring concert she played a solo.; Rain fell for a week. The river rose and flooded the lower
fields. The farmers had to plant their crops again.; Our company had a good year. Sales rose in every region. Next year
we plan to hire more people.; Walking is easy and free. It is good for the heart and the mind. Even twenty minutes a day
can help.; The old theater was about to close. The neighbors raised money to repair it. Now it shows films every
weekend.; Solar panels turn sunlight into electricity. They work best in sunny places. They make no smoke or noise.; Tom
left his bag on the train. A stranger found it and called him. They met at the station the next day.; The bakery started
with one oven. After ten years it had five shops. The owner still bakes the first loaf each morning.; Tea came to Europe
by ship. At first only the rich could buy it. Later it became a drink for everyone.; Owls hunt at night. Their soft
feathers make almost no sound. They can hear a mouse under the snow.; Lina moved to a new city. She knew nobody there.
She joined a chess club and soon had friends.; A good night's sleep helps the brain. It makes it easier to learn and
remember. Screens before bed can make sleep worse.; The school started a garden. Each class grows a different vegetable.
The cook uses them for lunch.
"""
REWRITE = [
    "Rewrite this sentence in other words: {x}",
    "Make this text more formal: {x}",
    "Continue this text with one more sentence: {x}",
    'Make this shorter: "{x}"',
    "Summarize this in a few words: {x}",
    'Rewrite this in the future tense: "{x}"',
    "Make this sound more exciting: {x}",
    "Turn this into a question: {x}",
    "Add more detail to this: {x}",
]

TASKS = """
converts kilometers to miles; converts Celsius to Fahrenheit; converts hours to seconds; converts grams to ounces; adds
a tip to a restaurant bill; computes the price after a discount; computes simple interest; splits a bill between
friends; computes the number of paint cans for a wall; computes how many pizzas a party needs; computes the perimeter of
a garden; computes the cost of tiles for a floor; computes the average of a list of grades; returns the highest grade in
a list; returns the shortest name in a list; counts the words in a sentence; counts the question marks in a text; counts
the spaces in a line; counts how many names start with a letter; counts the lines in a text file; reads a file and
prints it; writes a list of names to a file; appends a line to a log file; prints a greeting for a name; prints a
multiplication table for a number; prints a square of stars; prints a countdown from ten; prints the even numbers up to
a limit; prints every item of a shopping list with its number; prints a dictionary neatly; puts a word in quotation
marks; makes a word upper case; makes the first letter of every word upper case; trims a name typed by a user; makes a
shout out of a sentence; repeats a word a given number of times; joins a list of words with commas; labels each word of a
sentence
with its position; makes a file name from a title; checks whether a word starts with a vowel; checks whether a word contains a
letter; checks whether two words have the same length; checks whether a house number is on the odd side; checks whether
a number is negative; checks whether a year is a leap year; checks whether a password is long enough; checks whether a
string is empty; checks whether an item is in a list; checks whether a shop is open at an hour; checks whether a number
lies between two others; checks whether a user is an adult; adds two prices and a delivery fee; totals a shopping cart with
prices and
amounts; computes profit from income and costs; doubles every number in a list; squares a number; computes the yearly
cost of a monthly fee; rounds a price to two decimals; returns the absolute value of a number; returns the winner of a
game from two scores; returns the cheapest of three prices; returns the last item of a list; returns the first three
items of a list; returns the middle character of a word; returns the season for a month; returns the day of the week as
a word; returns a random color; rolls a die; flips a coin; picks a random name from a list; shuffles a list; makes a
random password; sorts a list of names; sorts products by price; prints a leaderboard from a dictionary of scores; makes
a guest list from two lists of friends; updates a stock of items; builds a menu from dishes and prices; counts the items
in a dictionary; finds a phone number in a dictionary; removes a key from a dictionary; adds a task to a to-do list;
removes a finished task from a list; keeps only unread messages; keeps only products under a price; turns a list of
strings into integers; turns a number into a string with a currency sign; formats a date; returns today's date; computes
an age from a birth year; computes the time a trip takes from distance and speed; computes body mass index; computes
fuel cost for a trip; gives a letter grade for a score; says whether it is morning or evening for an hour; says what to
wear for a temperature; finds the longest line in a text; makes initials from a full name; makes a username from a first
and last name; draws a triangle of numbers; waits for a number of seconds; asks the user for a name and greets them;
greets a user in one of three languages
"""
TASK = [
    "Write a Python function that {x}.",
    "Write a short Python function that {x}, with a comment.",
    "Show me a simple Python function that {x}.",
    "I am learning Python. How do I write a function that {x}?",
]

CHAT = """
Hello!; Hi there!; Hey, how are you?; Good morning!; Good evening!; Good night!; How is it going?; What's up?; How are
you today?; Nice to meet you.; Who are you?; What is your name?; What can you do?; How can you help me?; Are you a
robot?; Are you a person?; Who made you?; How old are you?; Where do you live?; Do you sleep?; Do you have feelings?; Do
you have a family?; Can you see me?; Can you speak other languages?; Do you like music?; Do you like pizza?; What is
your favorite color?; What is your favorite animal?; What is your favorite book?; What is your favorite season?; What do
you do for fun?; Thank you!; Thanks a lot for your help.; That was very helpful.; You are great!; I like talking to
you.; Sorry, I made a mistake.; I don't understand.; I'm bored.; I'm tired.; I'm happy today.; I feel a little sad.; I
had a bad day.; I'm nervous about tomorrow.; I can't sleep.; I'm hungry.; I'm hot.; It is my birthday today!; I got a
new job!; I passed my exam!; I just adopted a puppy.; My friend is angry with me.; I miss my family.; I lost my keys
again.; I'm going on vacation next week.; It's raining outside.; It's Monday again.; Finally, it's Friday!; Tell me a
joke.; Tell me a joke about a cat.; Tell me a joke about school.; Tell me a joke about computers.; Tell me a riddle.;
Tell me something interesting.; Tell me something nice.; Tell me a fun fact.; Make me laugh.; Give me a compliment.; Say
something encouraging.; Give me a motivational quote.; Let's play a word game.; Can we be friends?; Can I ask you a
question?; Can you keep a secret?; Do you ever get bored?; Are cats or dogs better pets?; Is it better to live in a city
or in the country?; Do you prefer tea or coffee?; Do you prefer summer or winter?; Is reading better than watching TV?;
What should I have for dinner?; What should I do this weekend?; Which movie should I watch tonight?; What should I name
my cat?; What should I name my goldfish?; Do you believe in luck?; What makes people happy?; What makes a good day?;
What would you do with a million dollars?; If you could travel anywhere, where would you go?; What is the meaning of
friendship?; Goodbye!; See you later!; Talk to you tomorrow.; Have a nice day!; Can you help me with my homework?; I
have a question about cooking.; I want to learn something new today.
"""
CHATTING = ["{x}", "Hi! {x}", "Hello. {x}", "Hey, one thing: {x}"]

ADJECTIVES = """
happy; sad; big; small; fast; slow; hot; cold; bright; dark; strong; weak; rich; poor; brave; shy; kind; cruel; calm;
angry; clever; foolish; honest; lazy; busy; quiet; loud; clean; dirty; ancient; modern; easy; difficult; beautiful;
ugly; wide; narrow; heavy; rough; smooth; sharp; empty; rare; common; generous; selfish; polite; rude; cheerful; gloomy;
curious; careful; careless; stubborn; flexible; fragile; sturdy; humble; proud; loyal; eager; reluctant; abundant;
scarce; temporary; permanent; visible; obvious; vague; precise; reliable; wealthy; cautious; reckless; optimistic;
tranquil; diligent; ambitious; genuine; peculiar
"""
ADJECTIVE = [
    'What is a synonym for "{x}"?',
    'What is the opposite of "{x}"?',
    'Give me three synonyms for "{x}".',
    'What does the word "{x}" mean?',
    'Use the word "{x}" in a sentence.',
]
WORDS = """
metaphor; simile; irony; paradox; hypothesis; theory; census; treaty; archive; horizon; harvest; orchard; meadow;
canyon; lagoon; peninsula; equator; latitude; nomad; pilgrim; ally; heir; mentor; rival; critic; patron; pioneer;
veteran; journey; quest; voyage; bargain; debt; profit; salary; merchant; routine; deadline; compromise; consensus;
dilemma; verdict; witness; evidence; rumor; nostalgia; serendipity; resilience; integrity; compassion; ambition; wisdom;
dignity; harmony; chaos; legacy; privilege; prejudice; analyze; summarize; postpone; persuade; hesitate; negotiate;
imitate; improvise; evaluate; contribute; abandon; achieve; admire; borrow; celebrate; collapse; conceal; declare;
emphasize; encourage; exaggerate; flourish; forgive; gather; ignore; inspire; migrate; neglect; nourish; observe;
preserve; predict; recover; resist; restore; sustain; transform; vanish; wander; whisper; yearn; ponder; reveal;
scatter; soothe; thrive; adjacent; brief; crucial; dormant; edible; feasible; hollow; inevitable; mutual; neutral;
tedious
"""
WORD = [
    'What does the word "{x}" mean?',
    'Define "{x}".',
    'Use the word "{x}" in a sentence.',
    'Explain the meaning of "{x}" in simple words.',
    'What is another word for "{x}"?',
]

PAIRS = """
a lake:a river; a sea:an ocean; a hill:a mountain; weather:climate; a planet:a star; a comet:an asteroid; a frog:a toad;
a butterfly:a moth; a crocodile:an alligator; a rabbit:a hare; a dolphin:a fish; a donkey:a horse; a sheep:a goat; a
turtle:a tortoise; a wolf:a dog; a lion:a tiger; a bee:a wasp; a mouse:a rat; a mammal:a reptile; a spider:an insect; a
fruit:a vegetable; a lemon:a lime; an apple:a pear; a pumpkin:a squash; jam:jelly; butter:margarine; tea:coffee;
yogurt:milk; baking:frying; boiling:steaming; a soup:a stew; a cake:a pie; a muffin:a cupcake; sugar:honey; sea
salt:table salt; brown rice:white rice; a herb:a spice; a virus:a bacterium; a cold:the flu; an artery:a vein; a
muscle:a bone; a vitamin:a mineral; a doctor:a nurse; a psychologist:a psychiatrist; an atom:a molecule; an element:a
compound; a solid:a liquid; a liquid:a gas; mass:weight; speed:velocity; heat:temperature; an acid:a base; a
conductor:an insulator; AC:DC; a physical change:a chemical change; a theory:a hypothesis; an area:a perimeter; a
square:a rectangle; a circle:a sphere; a mean:a median; a fraction:a decimal; an even number:an odd number;
hardware:software; the Internet:the World Wide Web; RAM:storage; a virus:a worm on computers; a laptop:a tablet; a
list:a tuple in Python; a compiler:an interpreter; a string:an integer; a bit:a byte; an email:a text message; a novel:a
short story; fiction:nonfiction; a poem:a song; a biography:an autobiography; a simile:a metaphor; a noun:a verb; an
adjective:an adverb; a vowel:a consonant; a synonym:an antonym; a comma:a semicolon; a comedy:a tragedy; a painting:a
drawing; a piano:an organ; a violin:a cello; a band:an orchestra; rock music:jazz; tennis:badminton; rugby:American
football; skiing:snowboarding; a train:a tram; a boat:a ship; a motorcycle:a bicycle; an airplane:a helicopter; a
hotel:a hostel; a city:a town; a state:a country; a king:a president; a democracy:a dictatorship; a law:a rule; a tax:a
fee; a credit card:a debit card; saving:investing; a job:a career; a leader:a manager; a goal:a wish; listening:hearing;
being alone:being lonely; a habit:a hobby
"""
PAIR = [
    "What is the difference between {x} and {y}?",
    "How is {x} different from {y}?",
    "Compare {x} and {y} in two sentences.",
    "What do {x} and {y} have in common?",
]


def _categories() -> list[tuple[int, list[list[str]]]]:
    """Every category's share in percent and its prompts, grouped by subject."""
    facts = _groups(COUNTRIES, CAPITAL) + _groups(COUNTRIES, COUNTRY) + _groups(PEOPLE, PERSON)
    facts += _groups(INVENTIONS, INVENTION) + _groups(EVENTS, EVENT) + _groups(BOOKS, BOOK) + _groups(PLANETS, PLANET)
    facts += _groups(ANIMALS, ANIMAL) + _groups(BODY, ORGAN) + _groups(ELEMENTS, ELEMENT) + _groups(PLACES, PLACE)
    facts += [[question] for question in _split(FACTS)]
    return [
        (20, facts),
        (25, _groups(ONE, TOPIC + TOPIC_ONE) + _groups(MANY, TOPIC + TOPIC_MANY)),
        (12, _groups(WORKINGS, WORKING) + _groups(GOALS, GOAL)),
        (6, _groups(LISTED, LIST)),
        (8, _groups(SUBJECTS, CREATE)),
        (4, _groups(PURPOSES, PURPOSE)),
        (8, _groups(SENTENCES, REWRITE)),
        (5, _groups(TASKS, TASK)),
        (3, _groups(CHAT, CHATTING)),
        (5, _groups(ADJECTIVES, ADJECTIVE) + _groups(WORDS, WORD)),
        (4, _groups(PAIRS, PAIR)),
    ]


def _ordered(groups: list[list[str]], rng: random.Random) -> list[str]:
    """The prompts of all groups in a random order that visits every group once before any group twice."""
    groups = [rng.sample(group, len(group)) for group in groups]
    result: list[str] = []
    for turn in range(max(len(group) for group in groups)):
        row = [group[turn] for group in groups if turn < len(group)]
        rng.shuffle(row)
        result += row
    return result


def prompts(count: int, seed: int) -> list[str]:
    """`count` distinct prompts in a mixed order; ValueError where there are not that many."""
    rng = random.Random(seed)
    chosen: dict[str, None] = {}
    spare: list[str] = []
    for share, groups in _categories():
        fresh = [text for text in dict.fromkeys(_ordered(groups, rng)) if text not in chosen]
        wanted = count * share // 100
        chosen.update(dict.fromkeys(fresh[:wanted]))
        spare += fresh[wanted:]
    rng.shuffle(spare)
    for text in spare:
        if len(chosen) >= count:
            break
        chosen[text] = None
    if len(chosen) < count:
        raise ValueError(f"only {len(chosen)} distinct prompts are available, not {count}")
    result = list(chosen)
    rng.shuffle(result)
    return result


if __name__ == "__main__":
    wanted_count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    print("\n".join(prompts(wanted_count, int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
