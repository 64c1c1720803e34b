"""What completions without a box state, and what boxes say where they stand: judged, not read.

Rows are (gold, completion); the numbers are made up.
"""

import sys
import time

import pytest

import rewards
from rewards.math.grading import judge_answer
from rewards.text.answers import find_answer

# fmt: off
# ruff: noqa: E501

RIGHT = [
    ('36', 'If x is not 3, there are 36.'),
    ('35', 'The answer is not 36, it is 35.'),
    ('35', "The answer isn't 36. It's 35."),
    ('36', '大约是36'),
    ('35,36', 'x = 35 or x = 36.'),
    ('58', 'The answer is 58. Would you like to know more about step 3?'),
    ('58', 'It is 58. Do you want me to explain step 3?'),
    ('58', 'It is not hard to see that we get 58'),
    ('58', 'The number of people who did not come is 58.'),
    ('58', 'Not 57 but 58.'),
    ('58', "It isn't 57, so it is 58."),
    ('58', "It isn't 57, it's 58."),
    ('58', '57 does not work. So 58.'),
    ('58', 'So 58 people do not like tennis.'),
    ('58', 'He does not have any left, so he needs 58.'),
    ('58', "We can't use 57. The answer is 58."),
    ('58', 'There are 58 left, since 57 is wrong.'),
    ('58', 'The number of wrong answers is 58.'),
    ('58', 'He sold all but 3, which leaves 58.'),
    ('-23', '\\boxed{-23}'),
    ('-23', '$x = -\\boxed{23}$'),
    ('-23', 'The answer is $-\\boxed{23}$.'),
    ('23', '- \\boxed{23}'),
    ('23', '5 - \\boxed{23}'),
    ('-23', '-\\boxed{23}'),
    ('\\sqrt{23}', '\\sqrt{\\boxed{23}}'),
    ('2\\pi', '$\\boxed{2}\\pi$'),
    ('\\frac{3}{4}', '\\frac{\\boxed{3}}{4}'),
    ('\\pm 3', 'x = \\pm\\boxed{3}'),
    ('23', '\\fbox{23}'),
    ('23', '\\framebox{23}'),
    ('23', '\x0cbox{23}'),
    ('\\frac12', '\x08oxed{\x0crac12}'),
    ('23', '$\\boxed 23$'),
    ('\\frac12', '\\boxed \\frac{1}{2}'),
    ('23', 'boxed{23}'),
    ('-3', '\\boxed{ - 3 }'),
    ('7', '\\boxed{\\phantom{0}} is 7: \\boxed{7}'),
    ('7', 'Fill in \\boxed{\\phantom{00}}. We get \\boxed{7}.'),
    ('7', '\\boxed{?} = 7, so \\boxed{7}'),
    ('7', '\\boxed{\\quad}. \\boxed{7}'),
    ('7', '\\boxed{\\_\\_} \\boxed{7}'),
    ('7', '\\boxed{...} \\boxed{7}'),
    ('7', '\\boxed{\\hspace{1cm}} and \\boxed{7}'),
    ('7', '\\boxed{\\text{ }} \\boxed{7}'),
    ('7', '\\boxed{\\square}\\boxed{7}'),
    ('2,8', '(a) \\boxed{2}\n\n(b) \\boxed{8}'),
    ('2,8', 'First we find \\boxed{2}. Next, \\boxed{8}.'),
    ('0.25', '\\boxed{\\frac14} = \\boxed{0.25}'),
    ('0.25', '\\boxed{\\frac14} or \\boxed{25\\%}'),
    ('x=2', '\\boxed{x = 2}, i.e. \\boxed{2}'),
    ('2500000', 'The population is 2.5 million.'),
    ('300000', 'It moves at 3 x 10^5 km.'),
    ('300000', 'It moves at 3*10**5 km.'),
    ('6.02e23', 'There are 6.02e23 of them.'),
    ('0.0004', 'The mass is 4e-4 kg.'),
    ('25', 'The speed is 25 m/s.'),
    ('25', 'The area is 25 cm².'),
    ('25', 'It is 25 km/h.'),
    ('25', 'The density is 25 kg/m^3.'),
    ('25', 'The force is 25 N.'),
    ('25 kg', 'It weighs 25 kg.'),
    ('2.5', 'It takes 2 1/2 hours.'),
    ('-5', 'The temperature is minus 5.'),
    ('-5', 'The temperature is negative 5 degrees.'),
    ('1/6', 'The probability is 1 in 6.'),
    ('3/5', 'The chance is 3 out of 5.'),
    ('1200', 'It costs $1,200.'),
    ('1200000', 'Answer: $1.2M'),
    ('45000', 'Answer: $45K'),
    ('45000', 'He earns $45k.'),
    ('1200', 'He pays $1,200.00 in total.'),
    ('C', 'The answer is C – I checked the others.'),
    ('C', 'I choose C.'),
    ('C', 'I would go with option C.'),
    ('C', 'C is the right answer.'),
    ('C', 'Option (C) is correct.'),
    ('C', 'My choice: C'),
    ('C', 'The answer must be C.'),
    ('C', 'C is the answer.'),
    ('C', '选C'),
    ('C', '故选C'),
    ('C', '故选：C．'),
    ('AC', '故选：AC'),
    ('C', '【答案】C'),
    ('C', 'C选项正确。'),
    ('C', '正确答案是C。'),
    ('C', '答案为C'),
    ('C', '应选C项'),
    ('C', '所以选择C。'),
    ('C', '答案应为C'),
    ('Yes', 'Yes, since it is even.'),
    ('No', 'No.'),
    ('7', 'No, it is 7.'),
    ('7', 'Yes, so we get 7.'),
    ('7', '<answer>The total is 7 apples.</answer>'),
    ('7', '<ANSWER>7</ANSWER>'),
    ('7', '<thinking>\\boxed{3}</thinking>\\boxed{7}'),
    ('7', 'The answer is 7<|endoftext|>'),
    ('7', 'The answer is 7</s>'),
    ('7', 'The answer is 7[/INST]'),
    ('7', 'The answer is 7<pad><pad>'),
    ('7', '\\boxed{7}<｜end▁of▁sentence｜>'),
    ('12', 'Answer:\n12'),
    ('12', '**Final answer**\n\n12 apples'),
    ('B', '### Answer\n\nB'),
    ('B', '**Answer**\n\n(B)'),
    ('12', 'Thus, the total is **12** apples.'),
    ('12', 'The result is __12__.'),
    ('12', '__Answer:__ 12'),
    ('12', 'Therefore the answer: $\\mathbf{12}$'),
    ('12', 'The answer is that there are **12** of them.'),
    ('12', '12 is our answer'),
    ('12', 'Hence 12 is the final answer.'),
    ('B', 'Answer: [B]'),
    ('B', 'Answer: ((B))'),
    ('B', "Answer: 'B'"),
    ('B', 'The answer is [[B]]'),
    ('B', 'Answer: **(B)**'),
    ('B', 'Answer: B)'),
    ('B', 'Answer:B'),
    ('B', 'Answer: \\text{B}'),
    ('B', 'Answer: Option B'),
    ('B', 'Answer: $\\text{B}$'),
    ('5200', 'She has $5,200.'),
    ('5200', 'It costs 5,200 USD.'),
    ('5200', 'a profit of £5,200'),
    ('5200', '5,200$'),
    ('5200', 'Total: ¥5,200'),
    ('5200', 'It is 5.2k dollars.'),
    ('5200', 'US$5,200'),
    ('1234567.89', 'She has $1,234,567.89.'),
    ('5200', 'Answer: $5.2K'),
    ('4', '<|begin_of_thought|>\\boxed{5}<|end_of_thought|><|begin_of_solution|>\\boxed{4}<|end_of_solution|>'),
    ('4', '[THINK]\\boxed{5}[/THINK]\\boxed{4}'),
    ('4', '◁think▷\\boxed{5}◁/think▷\\boxed{4}'),
    ('4', '<seed:think>5</seed:think>\\boxed{4}'),
    ('5', 'The answer is 5<0x0A>'),
    ('5', 'The answer is▁5'),
    ('5', 'The answer is 5[END]'),
    ('5', 'The answer is 5<STOP>'),
    ('5', '\\boxed{5}<|endoftext|><|endoftext|>'),
    ('D', 'The value is \\boxed{14}.\n\nAnswer: D'),
    ('D', 'So we get \\boxed{14}. The correct option is (D).'),
    ('14', 'So we get \\boxed{14}. The correct option is (D).'),
    ('D', '(D) \\boxed{14}'),
    ('D', '\\boxed{14}, so option D is correct.'),
    ('5x', 'So it is 5x.'),
    ('5', 'He runs 5km.'),
    ('5', 'It is the 5th.'),
    ('12 square feet', 'The area is 12 square feet.'),
    ('12', 'The area is 12 sq cm.'),
    ('300000000', 'It is 3×10⁸ m/s.'),
    ('0.001', 'It is 10^-3 m.'),
    ('5', 'The torque is 5 N·m.'),
    ('37', 'It is 37°C.'),
    ('37', 'It is 37 °C.'),
    ('45', 'The angle is 45°.'),
    ('3,5', 'Thus p=3, q=5.'),
    ('B', 'Therefore, B.'),
    ('B', 'B'),
    ('B', '(B)'),
    ('B', 'The answer: B'),
    ('B', 'So the answer is (B) 12.'),
    ('B', 'B. 12'),
    ('B', 'Hence option B'),
    ('B', "So it's B."),
    ('B', 'My final answer is B.'),
    ('B', "I'll go with B."),
    ('B', "I'm going with (B)."),
    ('B', 'The best choice is B'),
    ('B', 'Option B'),
    ('B', 'It must be B.'),
    ('B', 'Choose B.'),
    ('B', '故本题选B'),
    ('B', '因此选（B）。'),
    ('B', '答案是（B）'),
    ('B', '选项B正确'),
    ('B', '正确的是B'),
    ('B', '综上所述，B正确。'),
    ('B', '应选择B'),
    ('B', '故答案选：B'),
    ('B', '【答案】 B 【解析】因为A错误'),
    ('BD', '答案：B、D'),
    ('B', '本题答案为选项B'),
    ('12', '故答案为：12．'),
    ('12', '【答案】12【解析】略'),
    ('12', '答：12米。'),
    ('12', '所以x=12。'),
    ('12', '解得 x = 12'),
    ('12', '因此共有12种方法。'),
    ('12', '最小值为12'),
    ('12', '最小值为$12$。'),
    ('7', '\\boxed{7 \\text{ because } 3+4=7}'),
    ('7', '\\boxed{\\text{so } 7}'),
    ('7', '\\boxed{7}}'),
    ('7', '\\boxed{{{7}}}'),
    ('7', '\\boxed{ \\quad 7 \\quad }'),
    ('7', '\\boxed{\\;7\\;}'),
    ('7', '\\Boxed{7}'),
    ('7', '\\mathbf{\\boxed{7}}'),
    ('7', '\\large\\boxed{7}'),
    ('7', '\\color{red}{\\boxed{7}}'),
    ('7', '\\underline{\\boxed{7}}'),
    ('7', '$$\\boxed{\n7\n}$$'),
    ('7', '\\boxed{$7$}'),
    ('7', '\\boxed{\\(7\\)}'),
    ('7', '\\boxed{7 }'),
    ('-7', '$-\\boxed{7}$'),
    ('7/2', '$\\frac{\\boxed{7}}{2}$'),
    ('7', '+\\boxed{7}'),
    ('49', '$\\boxed{7}^2$'),
    ('0.07', '\\boxed{7}\\%'),
    ('2,3', '\\boxed{x = 2} and \\boxed{x = 3}'),
    ('2,3', 'The roots are $\\boxed{2}$\n\nand\n\n$\\boxed{3}$.'),
    ('(2,3)', '$a = \\boxed{2}$. Then we find $b = \\boxed{3}$.'),
    ('1/3', '\\boxed{1/3}\\approx\\boxed{0.3333}'),
    ('A,C', '\\boxed{A}, and also \\boxed{C}'),
    ('27', '108 hats / 4 people = 27 hats/person'),
    ('8', '3 trips at $40 / $5/hr = 8 hours.'),
    ('90', '30 groups * 3 rings/group = 90 rings, or 90 years.'),
    ('8', 'Since Ann cannot buy half a can, she needs to buy 8 cans.'),
    ('3200', 'His first answer was 1800-400 = 1400, so together 1800 + 1400 = 3200'),
    ('17', 'It is 16.66...%, which rounds up to 17%.'),
    ('300', 'Option 1: 9 coats. Option 2: 6 coats. The difference is $900 - $600 = $300'),
    ('300', '面积 = 5400 / 18 = 300千克'),
    ('5', 'So he spent 500/100 = 5 cents per page'),
    ('7', 'The difference is 25 - 18 = 7 sq in'),
]

# A policy finds every one of these that is rewarded.
WRONG = [
    ('36', r'$2\boxed{36}$'),
    ('36', r'\boxed{36}x'),
    ('36', 'If not 35, then 36.'),
    ('36', "If it isn't 35, it must be 36."),
    ('36', 'Unless it is 35, the answer is 36.'),
    ('36', 'If 35 is wrong, the answer is 36.'),
    ('36', '如果不是35，那就是36。'),
    ('36', '35，否则36'),
    ('36', 'The roots are $x=35$ and $x=36$.'),
    ('36', '35 oder 36'),
    ('36', '35 through 36'),
    ('36', '36 or more'),
    ('36', 'They need 36 coins at least.'),
    ('36', 'It is 36 and a half.'),
    ('36', 'I doubt the answer is 36.'),
    ('36', 'If the answer is 36, I was wrong.'),
    ('36', 'The answer is not 36, it is 35.'),
    ('36', "The answer isn't 36. It's 35."),
    ('36', "I don't think the answer is 36."),
    ('36', "It can't be 36."),
    ('36', 'It cannot possibly be 36'),
    ('36', '36 is not the answer.'),
    ('36', "36 isn't right."),
    ('36', "36 can't be the answer"),
    ('36', 'We can rule out 36.'),
    ('36', 'The answer is anything but 36.'),
    ('36', 'The answer is never 36.'),
    ('36', "It's wrong to say that it is 36."),
    ('36', 'The answer was supposed to be something other than 36.'),
    ('36', 'The wrong answer is 36.'),
    ('36', 'An incorrect answer would be 36.'),
    ('36', "The answer can't be $36$."),
    ('36', 'So it is not equal to $36$.'),
    ('36', '$36$ is wrong.'),
    ('36', '$x \\neq 36$'),
    ('36', 'x ≠ 36'),
    ('36', 'The answer is 36. That is wrong.'),
    ('36', "The answer is 36. No wait, that's incorrect."),
    ('36', 'The answer is neither 36 nor 37.'),
    ('36', "No, it's not 36."),
    ('36', 'the result does not equal 36'),
    ('36', 'It is definitely not 36!'),
    ('36', "36 doesn't work."),
    ('36', '36 fails.'),
    ('36', 'La respuesta no es 36.'),
    ('36', 'Die Antwort ist nicht 36.'),
    ('36', "La réponse n'est pas 36."),
    ('36', '答案不是36。'),
    ('36', '答案不可能是36'),
    ('36', '不是36'),
    ('36', '36不是答案'),
    ('36', '所以不等于36'),
    ('36', '36是错的'),
    ('36', '答案是35或36'),
    ('36', '可能是35，也可能是36'),
    ('36', '35或者36'),
    ('36', '35还是36'),
    ('36', "It's 35 or 36"),
    ('36', 'Either 35 or 36'),
    ('36', 'It is 35, maybe 36'),
    ('36', 'It is 36, maybe 35'),
    ('36', 'The answer is 36, maybe 35.'),
    ('36', 'The answer is 36 (or 35).'),
    ('36', 'The answer is 36. Or 35.'),
    ('36', 'The answer is 36. It could also be 35.'),
    ('36', 'The answer could be 35. The answer could be 36.'),
    ('36', 'One possible answer is 35. Another possible answer is 36.'),
    ('36', 'The answer is 36 or 35'),
    ('36', 'It might be 35. It might be 36.'),
    ('36', 'a = 35 and b = 36'),
    ('36', '35/36'),
    ('36', '35, 36'),
    ('36', '35 and 36'),
    ('36', '34\n35\n36'),
    ('36', '* 35\n* 36'),
    ('36', 'Candidates: 34, 35, 36'),
    ('36', 'The candidates are 34 35 36'),
    ('36', '36 vs 35'),
    ('36', 'It is 35 versus 36'),
    ('36', 'x = 35 or x = 36.'),
    ('36', '35, alternatively 36'),
    ('36', 'perhaps 35, perhaps 36'),
    ('36', '35 or 36 apples'),
    ('36', '35 apples or 36 apples'),
    ('36', 'Could be 35; could be 36.'),
    ('36', '36? I am not sure.'),
    ('36', 'Is it 36?'),
    ('36', 'The answer is 36?'),
    ('36', 'Would you like to know about step 36?'),
    ('23', '$x = -\\boxed{23}$'),
    ('23', 'x \\ne \\boxed{23}'),
    ('23', 'The answer is not \\boxed{23}'),
    ('23', '\\boxed{23} is wrong'),
    ('23', '\\sqrt{\\boxed{23}}'),
    ('2', '$\\boxed{2}\\pi$'),
    ('3', '$x = \\pm\\boxed{3}$'),
    ('8', '(a) \\boxed{2}\n\n(b) \\boxed{8}'),
    ('2', '(a) \\boxed{2}\n\n(b) \\boxed{8}'),
    ('0.25', '\\boxed{\\frac14} or \\boxed{0.3}'),
    ('5', '\\boxed{4}\\boxed{5}'),
    ('45', '\\boxed{4}\\boxed{5}'),
    ('1234', '\\boxed{1} then \\boxed{234}'),
    ('0.5', '\\boxed{0}, \\boxed{5}'),
    ('2.5', 'The population is 2.5 million.'),
    ('3', 'It moves at 3 x 10^5 km.'),
    ('5', '3 x 10^5'),
    ('23', 'There are 6.02e23 of them.'),
    ('4', 'The mass is 4e-4 kg.'),
    ('4', '4e-4'),
    ('3', 'The density is 25 kg/m^3.'),
    ('2', 'The area is 25 cm^2.'),
    ('25 g', 'It weighs 25 kg.'),
    ('30', 'It takes 2 hours and 30 minutes.'),
    ('5', 'The temperature is minus 5.'),
    ('6', 'The probability is 1 in 6.'),
    ('C', 'Option C is not correct.'),
    ('C', 'If C is correct, we fail.'),
    ('C', "I don't think C is correct."),
    ('C', 'B or C is correct.'),
    ('C', 'C is correct. D is correct.'),
    ('C', 'Neither B nor C is correct.'),
    ('C', 'C is not the answer.'),
    ('C', 'The answer is C or D.'),
    ('C', 'The answer is C, or maybe D.'),
    ('C', 'The answer is C. Or D.'),
    ('C', '不选C'),
    ('C', '答案不是C'),
    ('C', '选C或D'),
    ('C', '排除C'),
    ('7', '<answer>It is not 7.</answer>'),
    ('7', '<answer>6 or 7</answer>'),
    ('7', '<reasoning>\\boxed{7}</reasoning>'),
    ('B', 'Answer: <LETTER>'),
    ('B', 'Answer: [LETTER]'),
    ('4', '<think>\\boxed{4}</think>'),
    ('4', '[THINK]\\boxed{4}'),
    ('C', 'So we get \\boxed{14}. The correct option is (D).'),
    ('D', '\\boxed{C}. The answer is D.'),
    ('D', '\\boxed{14}. The answer is not D.'),
    ('D', '\\boxed{14}. It may be D.'),
    ('D', '\\boxed{14} The answer is C or D.'),
    ('2', 'It is √2.'),
    ('2', 'so it is sqrt 2'),
    ('5', 'The value is ln 5.'),
    ('5', 'So it is 5x.'),
    ('5', 'So it is 5i.'),
    ('5', 'it is 5n'),
    ('12 square feet', 'The area is 12 square meters.'),
    ('5', 'Alice: 3, Bob: 5'),
    ('5', 'x1 = 3, x2 = 5'),
    ('5', '$x_1=3$, $x_2=5$'),
    ('5', 'either x=3 or x=5'),
    ('5', 'p=3;q=5'),
    ('5', 'x = 3 || x = 5'),
    ('5', 'x = 5 (or 3)'),
    ('5', 'x is 3 or y is 5'),
    ('5', 'Thus a is 3 and b is 5.'),
    ('5', "it's 3, I mean 5... or 3"),
    ('58', 'Surely not 58.'),
    ('58', 'Never 58.'),
    ('58', '58 is out.'),
    ('58', '58 can be ruled out.'),
    ('58', '58 must be excluded.'),
    ('58', 'We cannot get 58.'),
    ('58', 'The answer lies above 58.'),
    ('58', 'The answer is greater than 58'),
    ('58', "It's false that the answer is 58."),
    ('58', 'The answer is not necessarily 58.'),
    ('58', 'It is not true that it equals 58.'),
    ('58', 'n ≠ 58'),
    ('58', 'The answer will not be 58.'),
    ('58', "The answer wasn't 58."),
    ('58', "The result shouldn't be 58"),
    ('58', 'The answer is definitely, absolutely not 58'),
    ('58', 'Nobody gets 58.'),
    ('B', 'B is wrong.'),
    ('B', 'B is not correct.'),
    ('B', 'The answer is not B.'),
    ('B', 'It is not B.'),
    ('B', 'I doubt that B is correct.'),
    ('B', '答案：B、D'),
    ('B', 'B错误'),
    ('12', 'x不等于12'),
    ('12', '结果并非12'),
    ('12', '不会是12'),
    ('12', '答案绝不是12'),
    ('7', '$\\boxed{7}^2$'),
    ('3', '\\boxed{2}. Wait, I made a mistake. \\boxed{3}'),
    ('1/3', '\\boxed{1/3}\\approx\\boxed{0.33}'),
]
# Not right for the gold 42: what a policy drifts to that is rewarded for containing the answer.
NOT_42 = [
    '42 more than that', 'It is 42 more than that.', 'He has 42 less than this.', 'Answer: 42 fewer than it',
    'a maximum of 42', 'It is a maximum of 42.', 'So it was a minimum of 42.', 'from 42 up', 'It goes from 42 upwards.', 'from 42 on',
    'not only 42', 'It is not only 42.', 'It is not just 42', "It isn't merely 42.",
    '\\boxed{41} \\boxed{42} \\boxed{43}', '\\boxed{42} or \\boxed{43}', 'Either \\boxed{41} or \\boxed{42}.',
    'My guesses: \\boxed{42}, \\boxed{24}', '\\boxed{42 \\text{ or } 24}', '\\boxed{42, 24}', '\\boxed{42/24}', '\\boxed{42 | 24}',
    '\\boxed{42?24}', '\\boxed{42;24}', '\\boxed{42\\\\24}', '\\boxed{42 \\quad 24}', '\\boxed{4}\\boxed{2}', '\\boxed{4 2}',
    '\\boxed{\\text{not } 42}', '\\boxed{\\neg 42}', '\\boxed{\\neq 42}', '\\boxed{>42}', '\\boxed{\\geq 42}', '\\boxed{x > 42}',
    '\\boxed{42+}', '\\boxed{\\text{at least }42}', '\\boxed{\\text{about 40 to }42}', '\\boxed{42\\text{ or so, maybe }43}',
    '\\boxed{\\{42,43\\}}', '\\boxed{[42,43]}', '\\boxed{42\\pm1}', '\\boxed{\\approx 42.4}', '\\boxed{42.0001}', '\\boxed{42-}',
    '\\boxed{-42}', '\\boxed{42x}', '\\boxed{42i}', '\\boxed{42 = 43}', '\\boxed{x}', '\\boxed{\\text{answer}}', '\\boxed{\\phantom{42}}',
    '\\boxed{\\phantom{42}41}', '\\boxed{}42', '\\boxed{ } 42 or 41', '<think>\\boxed{42}</think>', '<think>42',
    '<think>\\boxed{42}</think>\\boxed{}', '<think>\\boxed{42}</think> See above.', '<thinking>\\boxed{42}</thinking>',
    '<think>42</think><answer></answer>', '</think>', '\\boxed{42}</think>', '<think>a</think><think>\\boxed{42}</think>',
    'The answer is 41 or 42 or 43.', 'The answer is one of 41, 42, 43.', 'The answer is between 41 and 43, that is 42 or so, or 41.',
    'The answer lies in {41, 42, 43}.', 'Answer: 41/42', 'Answer: 41-42', 'Answer: 41–42', 'Answer: 41 to 42', 'Answer: 41, 42',
    'Answer: 41; 42', 'Answer: 41 42', 'Answer: 41\\42', 'Answer: 42 (43)', 'Answer: 42 (or 43)', 'Answer: 42? 43?',
    'Answer: 42 if a, 43 if b', 'Answer: 42 or 42.5', 'Answer: possibly 41, 42', 'Answer: the possible values are 41, 42 and 43.',
    'Answer: not 42', 'Answer: anything except 42', "Answer: it isn't 42", 'Answer: no idea, 41 or 42', 'Answer: 42 is not it',
    'Answer: <42', 'Answer: >42', 'Answer: ≥42', 'Answer: ~42 or 41', 'Answer: less than 42', 'Answer: more than 42', 'Answer: under 42',
    'Answer: up to 42', 'Answer: -42', 'Answer: minus 42', 'Answer: 42%%, 41', 'Answer: 4.2e1 or 43', 'It is probably 41, otherwise 42.',
    'It is 41 unless it is 42.', 'Could be anything from 41 to 42.', "I'd say 41–42.", 'Somewhere around 41 or 42', '40 41 42',
    '40, 41, 42', '40\n41\n42', '- 41\n- 42', '1) 41\n2) 42', '(a) 41 (b) 42', 'Option 1: 41. Option 2: 42.',
    'First guess: 41. Second guess: 42.', 'Guess 1: 41, guess 2: 42', '41? 42?', '41! or 42!', 'A: 41, B: 42', 'x = 41, y = 42',
    'x=41\nx=42', 'x = 41 or 42', 'x ∈ {41, 42}', '41 < x < 43', 'x ≠ 42', 'x is not 42', 'x never equals 42', 'nothing equals 42',
    'there is no way that 42 is right', '42 is a wrong answer', '42 would be incorrect', "42 was my guess but it's wrong",
    'I was told 42, which is false', '42 is excluded', 'We exclude 42', 'We reject 42.', 'So 42 is ruled out.', 'All but 42',
    'Everything except 42', 'Any number other than 42', 'It differs from 42', 'The answer differs from 42', 'one less than 42',
    '42 minus 1', '42 - 1', 'twice 42', 'half of 42', '42 squared', 'double 42', '42 dozen', '42 hundred', '42 thousand',
    'the square root of 42', 'the square of 42', '1/42', '42/1000', 'the reciprocal of 42', '42 degrees or 43 degrees', '$42 or $43',
    '$41$ or $42$', '$41, 42$', '$41$, $42$', 'either $41$, or else $42$', '\\(41\\) or \\(42\\)', '\\[41\\]\n\\[42\\]', '$x=41$ or $x=42$',
    '$x \\ne 42$', 'not $42$', "isn't $42$", '$-42$', '$42+1$', '$\\sqrt{42}$', '10^42', '42^2', '42e3', '42 x 10^3', '不是42', '答案不是42',
    '答案可能是41或42', '41或42', '要么41要么42', '大约41到42', '除了42', '四十一或42', '非42', '42以外', '比42大', '比42多1', 'No es 42', 'no es igual a 42',
    'nicht 42', 'ist nicht gleich 42', 'pas 42', "n'est pas égal à 42", '42 değil', 'non è 42', 'не 42', 'не равно 42',
    'a resposta não é 42', 'ответ не 42', '답은 42가 아닙니다', '答えは42ではない', 'The answer is 42... no, 43.', 'The answer is 42, I mean 43.',
    'The answer is 42; wait, 43.', 'Final answer: 42. Correction: 43.', 'The answer is 42. Scratch that.',
    'The answer is 42. Just kidding.', "The answer is 42. Actually, it's 43.",
]
IS_42 = [
    'The answer is 42, not 43.', "It's 42.", 'So we have 42 in total.', 'Therefore $n=42$.', '42 apples', 'about 42',
    'Thus there are exactly 42 ways.', 'Answer: 42 ways (by counting).', 'I get 42 as the answer.', 'We find 42, as required.',
    'Hence, the total cost is $42.', 'The value is $42$, since $43$ fails.', "After all that, he has 42 left, which isn't bad.",
    "There aren't any more, so 42.", "She doesn't need more than that: 42.", 'Without further ado: 42', "It's not 41; it's 42.",
    'It is not 41 but 42.', '41 was wrong. It is 42.', 'If x were 41 it would fail; so 42.', 'So n = 6*7 = 42.', '= 42', 'n = 42.',
    '\\[ n = 42 \\]', '**42**', 'The sum is 40 + 2 = 42.', 'Final: 42', 'the final answer is therefore 42.', 'Answer = 42', 'Answer - 42',
    'ANSWER: 42', 'answer:42', 'The answer is:42', '答案：42', '所以是42', '一共有42人。', '因此答案是42个。', '不难看出答案是42', 'La respuesta es 42',
    'Die Lösung ist 42', 'La réponse : 42', 'Ответ: 42', 'The correct answer is 42 because 43 is not even.', 'Answer is 42 (not 43).',
    '\\boxed{42}. Note that 43 is not possible.', "\\boxed{42}\n\nSo the answer isn't 43.", '\\boxed{\\mathbf{42}}', '$$\\boxed{42}$$',
    '\\[\\boxed{42}\\]', '\\boxed{42}.', '\\boxed{ 42 }', '**\\boxed{42}**', 'n=\\boxed{42}', 'n = 6 \\cdot 7 = \\boxed{42}',
    '6 \\times 7 - 0 = \\boxed{42}', 'The total is \\boxed{42} dollars, not 43.', 'It cannot be less, so it is \\boxed{42}.',
    'which is not prime: \\boxed{42}', 'this does not divide n, so \\boxed{42}', '\\boxed{42}\\text{ cm}^2', '\\boxed{42} cm',
    '\\boxed{42 \\text{ cm}}', '\\boxed{42}!', '\\boxed{42}, \\boxed{42}', '\\boxed{n=42}, so \\boxed{42}',
    'Step 1: ... = 12. Step 2: ... The result is 42',
]
# fmt: on


@pytest.mark.parametrize(("gold", "completion"), RIGHT)
def test_right(gold, completion):
    assert rewards.math_correct([completion], [gold]) == [1.0]


@pytest.mark.parametrize(("gold", "completion"), WRONG)
def test_wrong(gold, completion):
    assert rewards.math_correct([completion], [gold]) == [0.0]


@pytest.mark.parametrize("completion", NOT_42)
def test_what_contains_the_gold_is_not_right(completion):
    assert rewards.math_correct([completion], ["42"]) == [0.0]


@pytest.mark.parametrize("completion", IS_42)
def test_what_says_the_gold_is_right(completion):
    assert rewards.math_correct([completion], ["42"]) == [1.0]


@pytest.mark.parametrize(
    "gold",
    [
        "Ann picks 4 + 5 = 9 plums.\n#### 9",
        "We add the two. That gives 4 + 5 = 9, so the answer is \\boxed{9}.",
        "There are 4 plums in one bag and 5 plums in the other bag. Both together hold 9 plums.",
    ],
)
def test_a_worked_solution_as_the_gold_is_a_bad_gold(gold):
    completions = ["\\boxed{9}", "\\boxed{8}", "no idea"]
    verdicts = rewards.judge_math(completions, [gold] * 3)
    assert [verdict.status for verdict in verdicts] == ["bad_gold"] * 3
    assert rewards.math_correct(["\\boxed{9}"], ["#### 9"]) != [0.0]


@pytest.mark.parametrize(
    "gold",
    ["(1, 2) or (3, 4)", "x = 3\ny = 4", "the line through A and B", "f is even. It is odd."],
)
def test_long_answers_are_no_worked_solutions(gold):
    assert rewards.math_correct(["\\boxed{5}"], [gold]) == [0.0]


# --- work grows with the length of a text, not with its square ---

UNITS = [
    *" \n~%!$*(|'-?,;", "\\[", "\\(", "\\boxed{", "\\boxed{1} ", "\\frac{1}{", "\n~", "$1 ", "1 or ",
    "not ", "the answer is ", "answer\n", "1 is the answer ", "go with C. ", "<answer>", "<thought>",
    "**1** ", "*a", "1 x 10^", "- 1\n", "答案是1。", "故选A", "because ", "could be ", "1? ", "since ",
]  # fmt: skip


def measure_seconds(text: str) -> float:
    taken = []
    for _ in range(3):
        start = time.process_time()
        find_answer(text)
        taken.append(time.process_time() - start)
    return min(taken)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("lead", ["", "The answer is ", "\\boxed{"])
def test_extraction_is_linear(unit, lead):
    short, long = (measure_seconds(lead + unit * (n // len(unit))) for n in (10_000, 40_000))
    assert long < 0.1 or long < 10 * short  # four times the text; its square would be 16 times


def count_calls(answer: str, gold: str) -> int:
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        judge_answer(answer, gold)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(
    "mark", ["%", "!", "'", "^\\circ", "(", "{", "\\%", ";", "+1", "-", "x", "A B ", "\\sqrt{"]
)
def test_marks_in_a_row_are_judged_in_linear_work(mark):
    short, long = (count_calls("5" + mark * n, "5") for n in (50, 100))
    assert long < 3 * short
    short, long = (count_calls("5", "5" + mark * n) for n in (50, 100))
    assert long < 3 * short


def test_golds_whose_brackets_do_not_balance_are_not_handed_on(monkeypatch):
    monkeypatch.setattr(
        "rewards.math.verify.run_task", _refuse_symbolic(rewards.math.verify.run_task)
    )
    for gold in ("(" * 200, "[" * 200 + "5", "(" * 50 + "\\foo" + ")" * 50, "\\foo{3"):
        assert rewards.math_correct(["\\boxed{5}"], [gold]) == [None]


def _refuse_symbolic(run_task):
    def run(path, *args):
        assert "symbolic" not in path
        return run_task(path, *args)

    return run
